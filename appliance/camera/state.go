package camera

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"
)

// A State is how the streamer is.
type State struct {
	Online        bool // a camera gives pictures
	Width, Height int
	FPS           int // frames a second that the camera gives now
	Visitors      int // that watch the stream
}

// Limits of the streamer's answer.
const (
	askTimeout = 5 * time.Second
	maxState   = 256 << 10
)

// Ask asks the streamer at addr, host:port, how it is. An error says that it does not run, or not well.
func Ask(ctx context.Context, addr string) (State, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/state", nil)
	if err != nil {
		return State{}, fmt.Errorf("camera: %w", err)
	}
	t := &http.Transport{DisableKeepAlives: true}
	res, err := t.RoundTrip(req)
	if err != nil {
		return State{}, fmt.Errorf("camera: the streamer does not answer: %w", err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxState))
	switch {
	case err != nil:
		return State{}, fmt.Errorf("camera: the streamer broke off: %w", err)
	case res.StatusCode != http.StatusOK:
		return State{}, fmt.Errorf("camera: the streamer answers with status %d", res.StatusCode)
	}
	return parseState(b)
}

// parseState reads the answer to /state.
func parseState(b []byte) (State, error) {
	var doc struct {
		OK     bool `json:"ok"`
		Result struct {
			Source struct {
				Resolution  struct{ Width, Height int }
				Online      bool `json:"online"`
				CapturedFPS int  `json:"captured_fps"`
			} `json:"source"`
			Stream struct {
				Clients int `json:"clients"`
			} `json:"stream"`
		} `json:"result"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return State{}, fmt.Errorf("camera: the streamer's state cannot be read: %w", err)
	}
	if !doc.OK {
		return State{}, fmt.Errorf("camera: the streamer does not say that it is well")
	}
	s := doc.Result.Source
	return State{Online: s.Online, Width: s.Resolution.Width, Height: s.Resolution.Height, FPS: s.CapturedFPS, Visitors: doc.Result.Stream.Clients}, nil
}

// String says it to people, in one line.
func (s State) String() string {
	if !s.Online {
		return "no camera: nothing is plugged in, or it gives no picture; visitors see NO SIGNAL. Plug in a USB camera (ribbon cameras do not work), or try another cable or port"
	}
	watched := "nobody watches"
	if s.Visitors == 1 {
		watched = "1 visitor"
	} else if s.Visitors > 1 {
		watched = fmt.Sprintf("%d visitors", s.Visitors)
	}
	return fmt.Sprintf("camera works: %dx%d, %d pictures a second, %s", s.Width, s.Height, s.FPS, watched)
}

package server

import (
	"encoding/json"
	"net/http"
)

// Control answers those who play with the server: POST /faults with a [Fault] in JSON adds one, DELETE /faults takes all away, POST /revoke
// ends all logins, GET /counters tells the [Counters], and POST or GET /engine/PATH performs an administrator's request in the engine.
func (s *Server) Control() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /faults", func(w http.ResponseWriter, r *http.Request) {
		var f Fault
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&f); err != nil {
			refuse(w, http.StatusBadRequest, err.Error())
			return
		}
		s.Inject(f)
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("DELETE /faults", func(w http.ResponseWriter, _ *http.Request) {
		s.Clear()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /revoke", func(w http.ResponseWriter, _ *http.Request) {
		s.RevokeAll()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /counters", func(w http.ResponseWriter, _ *http.Request) {
		b, err := json.Marshal(s.Counters())
		if err != nil {
			refuse(w, http.StatusInternalServerError, err.Error())
			return
		}
		reply(w, http.StatusOK, b)
	})
	mux.HandleFunc("/engine/{path...}", func(w http.ResponseWriter, r *http.Request) {
		data, err := body(r)
		if err != nil {
			refuse(w, http.StatusBadRequest, err.Error())
			return
		}
		if r.Method == http.MethodGet {
			data = nil
		}
		out, err := s.Do(r.PathValue("path"), data)
		if err != nil {
			refuse(w, http.StatusBadRequest, err.Error())
			return
		}
		answer(w, map[string]any{"data": out})
	})
	return mux
}

package vnet

import (
	"fmt"
	"slices"
)

// A way is the number of what a route says beside its destination: its tunnel and its comment. Entries of the tries hold
// this number instead of the texts, so that they are small and without pointers.
type way uint32

// maxWay is the greatest way that fits into an entry.
const maxWay = 1<<wayBits - 1

// ways is a persistent list of what ways stand for. Routes without a comment share their tunnel's way; one with a
// comment has a way of its own. The zero value is empty.
type ways struct {
	chunks   []*[wayChunk]wayTexts
	free     way // the first of the unused ways plus one, or 0; each says which is next
	byTunnel dict[way]
}

type wayTexts struct {
	tunnel, comment string
	users           uint32 // routes
	next            way    // while there are none: the next unused way plus one
}

const wayChunk = 64

func (w *ways) get(x way) *wayTexts { return &w.chunks[x/wayChunk][x%wayChunk] }

// edit returns what may be changed of a way: a copy, unless fresh says that no one else sees w.
func (w *ways) edit(x way, fresh bool) *wayTexts {
	if !fresh {
		w.chunks = slices.Clone(w.chunks)
		c := *w.chunks[x/wayChunk]
		w.chunks[x/wayChunk] = &c
	}
	return w.get(x)
}

// hold returns the way for a tunnel and a comment, with one more user.
func (w *ways) hold(tunnel, comment string, fresh bool) (way, error) {
	if comment == "" {
		if e := w.byTunnel.get(tunnel); e != nil {
			w.edit(e.val, fresh).users++
			return e.val, nil
		}
	}
	if w.free == 0 {
		if err := w.grow(); err != nil {
			return 0, err
		}
	}
	x := w.free - 1
	t := w.edit(x, fresh)
	w.free = t.next
	*t = wayTexts{tunnel: tunnel, comment: comment, users: 1}
	if comment == "" {
		w.byTunnel = w.byTunnel.with(tunnel, x, fresh)
	} else if e := w.byTunnel.get(tunnel); e != nil {
		t.tunnel = e.key // one text for all routes
	}
	return x, nil
}

// grow adds a chunk of unused ways.
func (w *ways) grow() error {
	first := len(w.chunks) * wayChunk
	if first+wayChunk > maxWay {
		return fmt.Errorf("vnet: more than %d routes with comments", maxWay)
	}
	c := &[wayChunk]wayTexts{}
	for i := range len(c) - 1 {
		c[i].next = way(first + i + 2)
	}
	w.chunks = append(slices.Clip(w.chunks), c) // a table of before must not share the room behind its end
	w.free = way(first + 1)
	return nil
}

// drop takes a user from a way.
func (w *ways) drop(x way) {
	t := w.edit(x, false)
	if t.users--; t.users > 0 {
		return
	}
	if t.comment == "" {
		w.byTunnel = w.byTunnel.without(t.tunnel)
	}
	*t = wayTexts{next: w.free}
	w.free = x + 1
}

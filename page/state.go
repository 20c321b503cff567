package page

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/egret-project/egret/operator"
)

// The kinds of objects that a State has.
const (
	kindSystem  = "system" // one object, named ""
	kindTrouble = "trouble"
	kindEgress  = "egress"
	kindNode    = "node"
	kindPool    = "pool"
	kindMove    = "move"
)

// State is what the page shows: objects as JSON, by kind and name. The zero State has none.
type State struct {
	Revision int64 // of etcd
	Objects  map[string]map[string]json.RawMessage
}

// system is what the page says of the whole.
type system struct {
	Leader   string `json:"leader,omitempty"`
	Followed bool   `json:"followed"` // etcd is followed at present: what is shown is how it is
	Traffic  bool   `json:"traffic,omitempty"`
}

// newState returns the State of a cluster, whose leader whole is still without.
func newState(c operator.Cluster, whole system) (State, error) {
	s := State{c.Revision, map[string]map[string]json.RawMessage{}}
	var failed error
	add := func(kind, name string, v any) {
		b, err := json.Marshal(v)
		if err != nil {
			failed = fmt.Errorf("encoding %s %s: %w", kind, name, err)
			return
		}
		if s.Objects[kind] == nil {
			s.Objects[kind] = map[string]json.RawMessage{}
		}
		s.Objects[kind][name] = b
	}
	whole.Leader = c.Leader
	add(kindSystem, "", whole)
	for _, t := range c.Troubles {
		add(kindTrouble, string(t.Level)+" "+t.What+" "+t.Why, t)
	}
	for _, e := range c.Egresses {
		add(kindEgress, e.Name, e)
	}
	for _, n := range c.Nodes {
		add(kindNode, n.Name, n)
	}
	for _, p := range c.Pools {
		add(kindPool, p.Name, p)
	}
	for _, m := range c.Moves {
		add(kindMove, m.Key, m)
	}
	return s, failed
}

// Change is how a State becomes another one.
type Change struct {
	Revision int64                                 `json:"revision"`        // of the State that it becomes
	Whole    bool                                  `json:"whole,omitempty"` // from the zero State
	More     bool                                  `json:"more,omitempty"`  // it is a part: the next one follows at once
	Put      map[string]map[string]json.RawMessage `json:"put,omitempty"`   // by kind and name
	Gone     map[string][]string                   `json:"gone,omitempty"`  // names by kind, sorted
}

// Diff returns how one State becomes another, in parts of so many objects at most, so that no browser has to take in
// all at once; none: they are equal.
func Diff(from, to State, most int) (parts []Change) {
	var part Change
	n := 0
	cut := func() {
		if n++; n == most {
			parts, part, n = append(parts, part), Change{}, 0
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(to.Objects)) {
		for _, name := range slices.Sorted(maps.Keys(to.Objects[kind])) {
			object := to.Objects[kind][name]
			if old, ok := from.Objects[kind][name]; ok && bytes.Equal(old, object) {
				continue
			}
			if part.Put == nil {
				part.Put = map[string]map[string]json.RawMessage{}
			}
			if part.Put[kind] == nil {
				part.Put[kind] = map[string]json.RawMessage{}
			}
			part.Put[kind][name] = object
			cut()
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(from.Objects)) {
		for _, name := range slices.Sorted(maps.Keys(from.Objects[kind])) {
			if _, ok := to.Objects[kind][name]; ok {
				continue
			}
			if part.Gone == nil {
				part.Gone = map[string][]string{}
			}
			part.Gone[kind] = append(part.Gone[kind], name)
			cut()
		}
	}
	if n > 0 {
		parts = append(parts, part)
	}
	for i := range parts {
		parts[i].Revision, parts[i].More = to.Revision, i < len(parts)-1
	}
	if len(parts) > 0 && from.Objects == nil {
		parts[0].Whole = true
	}
	return parts
}

// events returns the parts as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html). JSON
// has no line breaks.
func events(parts []Change) ([]byte, error) {
	var b bytes.Buffer
	for _, p := range parts {
		text, err := json.Marshal(p)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "data: %s\n\n", text)
	}
	return b.Bytes(), nil
}

package gossip

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/internal/syncbuf"
)

// file is what members read their keys of.
type file struct {
	mu    sync.Mutex // guards the rest
	keys  [][]byte
	err   error
	asked int
}

func (f *file) read() ([][]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return f.keys, f.err
}

// write replaces what is read, and returns when a member has read it and, since it asks again, has done what follows.
func (f *file) write(t *testing.T, err error, keys ...[]byte) {
	t.Helper()
	f.mu.Lock()
	f.keys, f.err = keys, err
	from := f.asked
	f.mu.Unlock()
	for deadline := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
		f.mu.Lock()
		n := f.asked
		f.mu.Unlock()
		if n >= from+2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the keys are not read again")
		}
	}
}

func TestMembersUnderstandEachOtherWhileTheirKeysAreReplaced(t *testing.T) {
	t.Parallel() // it waits for most of its time
	port := port.Hold(t)
	one, two, three := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32), bytes.Repeat([]byte{3}, 16)
	peers := map[string]netip.Addr{name(0): addr(0), name(1): addr(1)}
	var logs [2]syncbuf.Buffer
	var files [2]file
	var all [2]*Gossip
	for i := range all {
		files[i].keys = [][]byte{one}
		g := New(Config{
			Node: name(i), Port: port, Key: one, Keys: files[i].read, keysEvery: time.Millisecond,
			Log: slog.New(slog.NewTextHandler(&logs[i], nil)), Changed: func() {},
		})
		g.Set(addr(i), peers, nil, 1)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); g.Run(ctx) }()
		t.Cleanup(func() { cancel(); <-done })
		all[i] = g
	}
	await(t, all[0], name(1), Alive)
	await(t, all[1], name(0), Alive)

	for i := range files { // one after the other: in between they have different ones, and hear each other
		files[i].write(t, nil, one, two)
	}
	for i := range files {
		files[i].write(t, nil, two, three, one)
	}
	files[0].write(t, errors.New("no such file"))
	files[0].write(t, nil, []byte("short"))
	files[0].write(t, nil)
	for i := range files {
		files[i].write(t, nil, two)
	}
	for i, g := range all {
		if keys := g.ring.GetKeys(); len(keys) != 1 || !bytes.Equal(keys[0], two) {
			t.Errorf("%s has %d keys, want the new one alone", name(i), len(keys))
		}
		if log := logs[i].String(); strings.Contains(log, "rypt") {
			t.Errorf("%s did not understand the other one:\n%s", name(i), log)
		}
	}
	if log := logs[0].String(); strings.Count(log, "stay as they were") < 3 {
		t.Errorf("three faulty files are not told:\n%s", log)
	}

	// Who has the former key alone is heard by nobody any more, and who comes with the new one is.
	late, _ := start(t, 2, port, two, peers)
	await(t, all[0], name(2), Alive)
	await(t, late, name(1), Alive)
	files[1].write(t, nil, one)
	await(t, all[0], name(1), Dead)
}

func TestARingGetsTheKeysThatAreWanted(t *testing.T) {
	key := func(c rune) []byte { return bytes.Repeat([]byte{byte(c)}, 16) }
	ring, err := memberlist.NewKeyring(nil, key('a'))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"a", "abc", "ac", "ab", "ba", "bca", "cab", "cb", "dcb", "bd", "xyz", "zy", "abcd", "d", "da"} {
		var keys [][]byte
		for _, c := range want {
			keys = append(keys, key(c))
		}
		before := ring.GetKeys()
		was := slices.Clone(before)
		if changed, err := install(ring, keys); err != nil || changed == (want == "a") {
			t.Errorf("%s: changed %v, error %v", want, changed, err)
		}
		if !slices.EqualFunc(before, was, bytes.Equal) {
			t.Errorf("%s: who reads the keys meanwhile sees %q become %q", want, was, before)
		}
		have := ring.GetKeys()
		if len(have) != len(keys) || !bytes.Equal(have[0], keys[0]) || slices.ContainsFunc(keys, func(k []byte) bool { return !has(have, k) }) {
			t.Errorf("%s: the ring has %q", want, have)
		}
		if changed, err := install(ring, keys); err != nil || changed {
			t.Errorf("%s once more: changed %v, error %v", want, changed, err)
		}
	}
}

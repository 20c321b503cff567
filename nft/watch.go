package nft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Watch calls changed after every commit that changed something of our tables and was not made by t, beginning with
// those since New, until ctx ends, and returns nil then. Several commits in a row may be one call. When the kernel had
// to drop events, that counts as a change. changed must not block. Only one Watch may run at a time.
//
// Commits of t are told apart by the netlink port that they came from. The process id that the kernel reports is that
// of a thread, and in the first pid namespace: an agent in a container would not know its own.
func (t *Tables) Watch(ctx context.Context, changed func()) error {
	if err := t.watch.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("watching nftables: %w", err)
	}
	// A deadline ends the blocked read; the socket stays usable.
	stop := context.AfterFunc(ctx, func() { t.watch.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	t.events.run(true)
	defer t.events.run(false)
	for {
		msgs, err := t.watch.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			t.events.change()
			changed()
			continue
		case err != nil:
			return fmt.Errorf("watching nftables: %w", err)
		}
		ours := false
		for _, m := range msgs {
			if t.concerned(m) {
				ours = true
				t.events.change()
			} else if generation, ok := committed(m); ok {
				t.events.commit(generation)
			}
		}
		if ours {
			changed()
		}
	}
}

// committed returns which generation of the ruleset a commit made, of the event that ends it.
func committed(m netlink.Message) (generation uint32, ok bool) {
	if m.Header.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN || len(m.Data) < 4 {
		return 0, false
	}
	a, err := decode(m.Data[4:])
	return a.uint32(unix.NFTA_GEN_ID), err == nil
}

// eventLag is for how long Observe waits for events of a commit that has ended: they are sent in that very call.
const eventLag = 20 * time.Millisecond

// events are what Watch knows of the commits of all programs.
type events struct {
	mu         sync.Mutex // guards what follows
	seen       *sync.Cond // when that changes
	running    bool
	begun      bool   // there is a generation
	generation uint32 // of the last commit whose events were read, or need not be; the number wraps
	changed    bool   // somebody else changed our tables since reset, or events were lost

	lag time.Duration // eventLag, but in tests
}

func newEvents() *events {
	e := &events{lag: eventLag}
	e.seen = sync.NewCond(&e.mu)
	return e
}

// update changes the events, and wakes who waits.
func (e *events) update(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
	e.seen.Broadcast()
}

// run notes that Watch begins or ends. What came before it begins is not known.
func (e *events) run(running bool) { e.update(func() { e.running, e.changed = running, true }) }

func (e *events) change() { e.update(func() { e.changed = true }) }

// commit takes in a commit. The kernel counts them, without 0: a gap is of events that are lost, which it may not say a
// second time.
func (e *events) commit(generation uint32) {
	e.update(func() {
		if next := max(e.generation+1, 1); e.begun && int32(generation-next) > 0 {
			e.changed = true
		}
		e.reach(generation)
	})
}

// reset forgets what was changed: everything is about to be read, at a generation or a later one.
func (e *events) reset(generation uint32) {
	e.update(func() {
		e.changed = false
		e.reach(generation)
	})
}

// reach notes a generation, unless a later one is known. The caller holds mu.
func (e *events) reach(generation uint32) {
	if !e.begun || int32(generation-e.generation) > 0 {
		e.begun, e.generation = true, generation
	}
}

// spare reports whether nobody but t has changed our tables from reset up to a generation of the ruleset. It waits for
// events for lag.
func (e *events) spare(generation uint32) bool {
	late := false
	timer := time.AfterFunc(e.lag, func() { e.update(func() { late = true }) })
	defer timer.Stop()
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.running && !e.changed && int32(e.generation-generation) < 0 && !late {
		e.seen.Wait()
	}
	return e.running && !e.changed && int32(e.generation-generation) >= 0
}

// concerned reports whether an event of the nftables group says that someone else changed one of our tables. The name
// of the table is the first attribute of every event of nf_tables but the one that ends a commit, which has none.
func (t *Tables) concerned(m netlink.Message) bool {
	if m.Header.PID == t.write.nl.PID() || len(m.Data) < 4 {
		return false
	}
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || m.Header.Type&0xff == unix.NFT_MSG_NEWGEN {
		return false
	}
	switch nftables.TableFamily(m.Data[0]) {
	case nftables.TableFamilyINet, nftables.TableFamilyARP, nftables.TableFamilyNetdev:
	default:
		return false
	}
	a, err := decode(m.Data[4:])
	return err != nil || a.string(unix.NFTA_TABLE_NAME) == egress.TableName // what cannot be read may be ours
}

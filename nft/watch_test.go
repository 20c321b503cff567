package nft

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/netns"
)

// watch runs Watch until the test ends and counts its calls.
func watch(t testing.TB, tables *Tables) *atomic.Int64 {
	t.Helper()
	var calls atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- tables.Watch(ctx, func() { calls.Add(1) }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Watch: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Watch does not end with its context")
		}
	})
	return &calls
}

func TestWatchSeesTheHandsOfOthers(t *testing.T) {
	tables := openShared(t)
	reach(t, tables, State{})
	calls := watch(t, tables)
	for _, damage := range []string{
		"add element inet egret pod4 { 10.244.1.2 : 1 }",
		"delete element inet egret pod4 { 10.244.1.2 }",
		"insert rule inet egret guard accept",
		"flush chain arp egret out",
		"add table inet egret { flags dormant; }",
		"flush ruleset",
	} {
		before := calls.Load()
		nft(t, damage)
		eventually(t, "no event for "+damage, func() bool { return calls.Load() > before })
	}
}

// Permits are renewed many times a second: if they counted, the agent would never rest.
func TestWatchSkipsOwnCommitsAndOtherTables(t *testing.T) {
	tables := openShared(t)
	reach(t, tables, large(50))
	for range 20 {
		if err := tables.Permit([]Permit{{IP: ip4, Answer: true}}, time.Second); err != nil {
			t.Fatal(err)
		}
	}
	reach(t, tables, large(40))
	nft(t, foreign)
	netns.Run(t, "nft delete table inet foreign")
	nft(t, "add table ip egret") // of another family
	other := openHere(t, Config{Shared: true})
	if err := other.Permit([]Permit{{IP: ip4}}, time.Second); err != nil {
		t.Fatal(err)
	}
	// Events come in order: the other Tables' are the last.
	tables.watch.SetReadDeadline(time.Now().Add(10 * time.Second))
	skipped := 0
	for {
		msgs, err := tables.watch.Receive()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range msgs {
			if !tables.concerned(m) {
				skipped++
				continue
			}
			if m.Header.PID != other.write.nl.PID() {
				t.Errorf("event %v counts as someone else's hand", m.Header)
			}
			t.Logf("%d events skipped", skipped)
			return
		}
	}
}

func TestALostEventIsAChange(t *testing.T) {
	tables := openShared(t)
	reach(t, tables, State{})
	if err := tables.watch.SetReadBuffer(1); err != nil { // the kernel makes it its smallest
		t.Fatal(err)
	}
	for range 50 {
		nft(t, foreign)
	}
	calls := watch(t, tables)
	eventually(t, "no call for lost events", func() bool { return calls.Load() > 0 })
	before := calls.Load()
	nft(t, "insert rule inet egret guard accept")
	eventually(t, "no event after lost ones", func() bool { return calls.Load() > before })
}

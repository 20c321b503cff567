package crdsync

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

// TestHistoryIsBoundedByAgeByIPAndInAll has a real etcd, and a leader.
func TestHistoryIsBoundedByAgeByIPAndInAll(t *testing.T) {
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcdtest.New(t).Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	lead, err := client.Campaign(t.Context(), store.CrdsyncElection, "test", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	h := &blockHistory{store: client, lead: lead, keep: 24 * time.Hour, most: 300, ofIP: 200, log: slog.New(slog.DiscardHandler)}
	put := func(ip string, n int, until func(i int) time.Time) {
		t.Helper()
		var ops []store.Op
		for i := range n {
			tenure := egress.BlockTenure{IP: netip.MustParseAddr(ip), First: uint16(2048 + 64*(i%900)), Size: 64, Node: "n", Since: until(i).Add(-time.Hour), Until: until(i)}
			value, err := store.Encode(tenure)
			if err != nil {
				t.Fatal(err)
			}
			ops = append(ops, store.Op{Key: store.BlockHistoryKey(tenure), Value: value})
		}
		for part := range slices.Chunk(ops, maxOps) {
			if err := lead.Commit(t.Context(), part...); err != nil {
				t.Fatal(err)
			}
		}
	}
	// left returns how many there are of an IP, and the age of the oldest.
	left := func(ip string) string {
		t.Helper()
		all, faults, err := client.BlockHistory(t.Context(), netip.MustParseAddr(ip))
		if err != nil || len(faults) > 0 {
			t.Fatal(faults, err)
		}
		if len(all) == 0 {
			return "0"
		}
		return fmt.Sprintf("%d, %v", len(all), now.Sub(all[0].Until))
	}
	trim := func() {
		t.Helper()
		for {
			more, err := h.trim(t.Context(), now)
			if err != nil {
				t.Fatal(err)
			}
			if !more {
				return
			}
		}
	}
	minutes := func(i int) time.Time { return now.Add(-time.Duration(i+1) * time.Minute) }
	put("10.0.0.1", 10, minutes)
	// three of them are too old, and the fourth is as old as may be
	put("10.0.0.2", 10, func(i int) time.Time { return now.Add(-25*time.Hour + time.Duration(i)*20*time.Minute) })
	if err := lead.Commit(t.Context(), store.Op{Key: store.BlockHistoryPrefix + "nonsense", Value: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	trim()
	if a, b := left("10.0.0.1"), left("10.0.0.2"); a != "10, 10m0s" || b != "7, 24h0m0s" || h.known.Load() != 17 {
		t.Errorf("by age: %s and %s are left, %d known", a, b, h.known.Load())
	}
	records, err := client.List(t.Context(), store.BlockHistoryPrefix+"nonsense")
	if err != nil || len(records) > 0 {
		t.Errorf("%v, %v: a key that nobody can read stays", records, err)
	}
	put("10.0.0.1", 230, minutes)
	trim()
	if a, b := left("10.0.0.1"), left("10.0.0.2"); a != "200, 3h20m0s" || b != "7, 24h0m0s" {
		t.Errorf("of one IP: %s and %s are left", a, b)
	}
	put("10.0.0.3", 190, minutes)
	if u := h.record(egress.Block{IP: netip.MustParseAddr("10.0.0.4"), First: 2048, Size: 64, Node: "n", Since: now, Freed: now}); len(u) != 1 {
		t.Errorf("%v: as far as this leader knows there is room", u)
	}
	trim() // 397 are a few too many
	if a, b, c := left("10.0.0.1"), left("10.0.0.2"), left("10.0.0.3"); b != "0" || h.known.Load() != 270 {
		t.Errorf("in all: %s, %s and %s are left, %d known", a, b, c, h.known.Load())
	}
	h.known.Store(300)
	full := egress.Block{IP: netip.MustParseAddr("10.0.0.4"), First: 2048, Size: 64, Node: "n", Since: now, Freed: now}
	if u := h.record(full); len(u) != 0 || !h.full.Load() {
		t.Errorf("%v: there is no room", u)
	}
	h.known.Store(270)
	trim()
	if u := h.record(full); len(u) != 1 || h.full.Load() {
		t.Errorf("%v: there is room again", u)
	}
	if err := lead.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.keep = time.Second
	if _, err := h.trim(t.Context(), now); err == nil {
		t.Error("who leads no more trims")
	}
}

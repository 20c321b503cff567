package store

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

func TestAChangeThatAsksForStillnessIsRefusedAfterAnyPutBelow(t *testing.T) {
	s := start(t)
	l := lead(t, t.Context(), dial(t, s), "a")
	put := func(key string, still int64) (int64, error) {
		return l.CommitAt(t.Context(), Op{Key: "blocks/1/", Still: still}, Op{Key: key, Value: []byte("x")})
	}
	if _, err := put("blocks/1/a", 1); err != nil {
		t.Fatalf("with nothing there: %v", err)
	}
	seen := get(t, s.Client(), "blocks/1/a").Revision
	other, err := l.CommitAt(t.Context(), Op{Key: "blocks/2/a", Value: []byte("x")}, Op{Key: "blocks/1", Value: []byte("x")})
	if got := get(t, s.Client(), "blocks/2/a").Revision; err != nil || other != got {
		t.Errorf("committed at %d, %v; the key is of %d", other, err, got)
	}
	next, err := put("blocks/1/b", seen)
	if err != nil {
		t.Fatalf("only keys beside it changed: %v", err)
	}
	if _, err := put("blocks/1/c", next-1); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "blocks/1/") {
		t.Errorf("another key below was put: %v, want ErrConflict with the prefix", err)
	}
	if err := l.Commit(t.Context(), Op{Key: "blocks/1/b"}); err != nil {
		t.Fatal(err)
	}
	if _, err := put("blocks/1/c", seen); err != nil {
		t.Errorf("a key below was deleted: %v", err)
	}
	if err := l.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestAChangeThatAsksForAKeyIsRefusedWithoutIt(t *testing.T) {
	s := start(t)
	l := lead(t, t.Context(), dial(t, s), "a")
	put := func() error {
		return l.Commit(t.Context(), Op{Key: "allocations/1", Exists: true}, Op{Key: "cloud/1", Value: []byte("x")})
	}
	if err := put(); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "allocations/1") {
		t.Errorf("without the key: %v, want ErrConflict with the key", err)
	}
	if err := l.Commit(t.Context(), Op{Key: "allocations/1", Value: []byte("y")}); err != nil {
		t.Fatal(err)
	}
	if err := put(); err != nil {
		t.Errorf("with the key: %v", err)
	}
	if got := string(get(t, s.Client(), "allocations/1").Value); got != "y" {
		t.Errorf("the key that is asked for says %q, want it unchanged", got)
	}
}

func TestBlocksAreListedInOrderAndBadOnesNamed(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	since := time.Date(2026, 11, 28, 11, 0, 0, 0, time.UTC)
	of := func(ip string, first uint16, size int) egress.Block {
		return egress.Block{IP: netip.MustParseAddr(ip), First: first, Size: size, Node: "n", Since: since}
	}
	good := []egress.Block{of("9.0.0.1", 2048, 1024), of("9.0.0.1", 16384, 64), of("10.0.0.1", 4096, 64), of("fd00::1", 4096, 64)}
	records := map[string]any{
		"blocks/10.0.0.1/04160":  of("10.0.0.1", 4224, 64), // the key says another port
		"blocks/10.0.0.1/04224":  of("10.0.0.1", 4224, 65),
		"blocks/10.0.0.1/4288":   of("10.0.0.1", 4288, 64), // four digits
		"blocks/10.0.0.01/04288": of("10.0.0.1", 4288, 64),
		"blocks/10.0.0.1/04352":  egress.Block{IP: netip.MustParseAddr("10.0.0.1"), First: 4352, Size: 64},
		"blocks/10.0.0.1/04416":  "nonsense",
		"blocks/10.0.0.1/70000":  of("10.0.0.1", 4464, 64),
	}
	for _, b := range good {
		records[BlockKey(b.IP, b.First)] = b
	}
	putAll(t, s.Client(), c, records)
	compare := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	blocks, faults, err := c.Blocks(t.Context(), netip.Addr{})
	if d := cmp.Diff(good, blocks, compare); err != nil || d != "" {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
	if len(faults) != len(records)-len(good) {
		t.Errorf("faults: %v", faults)
	}
	for _, f := range faults {
		if !strings.HasPrefix(f.Key, "blocks/10.0.0.") || f.Err == nil {
			t.Errorf("fault %+v", f)
		}
	}
	blocks, _, err = c.Blocks(t.Context(), netip.MustParseAddr("9.0.0.1"))
	if d := cmp.Diff(good[:2], blocks, compare); err != nil || d != "" {
		t.Errorf("those of one IP: %v (-want +got):\n%s", err, d)
	}
}

func TestBlockHistoryIsListedByItsEndAndBadRecordsNamed(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	begin := time.Date(2026, 11, 28, 11, 0, 0, 0, time.UTC)
	of := func(ip string, first uint16, since, until int) egress.BlockTenure {
		return egress.BlockTenure{IP: netip.MustParseAddr(ip), First: first, Size: 64, Node: "n", Egress: "e",
			Since: begin.Add(time.Duration(since) * time.Second), Until: begin.Add(time.Duration(until) * time.Second)}
	}
	good := []egress.BlockTenure{of("10.0.0.1", 4160, 0, 1), of("10.0.0.1", 4096, 0, 2), of("10.0.0.1", 4096, 2, 2), of("10.0.0.1", 4096, 2, 300)}
	records := map[string]any{
		// the key says another port
		"blocks-history/10.0.0.1/04096/20261128T110000Z-20261128T110000Z": of("10.0.0.1", 4160, 0, 0),
		"blocks-history/10.0.0.1/04096/nonsense":                          "nonsense",
		// of another IP, whose text begins alike
		"blocks-history/10.0.0.10/04096/x": of("10.0.0.10", 4096, 0, 1),
		"blocks/10.0.0.1/04096":            egress.Block{IP: netip.MustParseAddr("10.0.0.1"), First: 4096, Size: 64, Node: "n"},
	}
	for _, b := range good {
		records[BlockHistoryKey(b)] = b
	}
	putAll(t, s.Client(), c, records)
	tenures, faults, err := c.BlockHistory(t.Context(), netip.MustParseAddr("10.0.0.1"))
	if d := cmp.Diff(good, tenures, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); err != nil || d != "" {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
	if len(faults) != 2 {
		t.Errorf("faults: %v, want 2", faults)
	}
	for _, b := range good {
		if ip, until, err := BlockHistoryEnd(BlockHistoryKey(b)); err != nil || ip != b.IP || !until.Equal(b.Until) {
			t.Errorf("the key says %s, %v, %v; want %s, %v", ip, until, err, b.IP, b.Until)
		}
	}
	if _, _, err := BlockHistoryEnd("blocks-history/10.0.0.1/04096"); err == nil {
		t.Error("a key without a time is taken for one")
	}
	if blocks, bad, err := c.Blocks(t.Context(), netip.Addr{}); len(blocks) != 1 || len(bad) != 0 || err != nil {
		t.Errorf("blocks in use %v, faults %v, %v: history is none of them", blocks, bad, err)
	}
}

// putAll writes records by their keys, such as a Client would not write, too.
func putAll(t *testing.T, etcd *clientv3.Client, c *Client, records map[string]any) {
	t.Helper()
	for key, r := range records {
		v, err := Encode(r)
		if err == nil {
			_, err = etcd.Put(t.Context(), c.key(key), string(v))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

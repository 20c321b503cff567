package store

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/egret-project/egret/egress"
)

// Whole is all that etcd holds: Everything, the members of all egresses in ByEgress, and what follows.
type Whole struct {
	Everything
	Unselected map[string]egress.Members // the pods that no egress selects, by node
	Blocks     []egress.Block            // sorted by IP and first port
	Leader     string                    // the id of the crdsync that leads; empty: none does
}

// wholePrefixes are the prefixes of the records of a Whole.
var wholePrefixes = append(slices.Clone(control), OwnerPrefix, AllocationPrefix, MembersByEgress, MembersByNode, BlockPrefix, CrdsyncElection.prefix())

// ReadWhole reads all that etcd holds at one revision. Records that cannot be read are in Faults.
func (c *Client) ReadWhole(ctx context.Context) (Whole, error) {
	list, err := c.list(ctx, wholePrefixes, 0)
	if err != nil {
		return Whole{}, fmt.Errorf("reading etcd: %w", err)
	}
	return WholeOf(list.revision, list.records), nil
}

// WholeOf returns the Whole of the records, by key, that etcd holds at a revision.
func WholeOf(revision int64, records map[string]Record) Whole {
	t := newWholeTables()
	for key, r := range records {
		t.apply(key, &r, true)
	}
	return t.whole(revision)
}

// wholeTables are the tables of a Whole.
type wholeTables struct {
	*tables
	unselected table[string, egress.Members]
	blocks     map[string]egress.Block // by key
	candidates map[string]Record       // who stands for election, by key
}

func newWholeTables() *wholeTables {
	check := func(node string, m egress.Members) error { return checkMembers(membersKey{egress.Unselected, node}, m) }
	return &wholeTables{
		tables:     newTables(""),
		unselected: table[string, egress.Members]{below: MembersByNode, parse: parseName, check: check},
		blocks:     map[string]egress.Block{}, candidates: map[string]Record{},
	}
}

// apply takes in one key's record, as that of tables does.
func (t *wholeTables) apply(key string, r *Record, first bool) {
	rest, ofNode := strings.CutPrefix(key, MembersByNode)
	node, name, _ := strings.Cut(rest, "/")
	var err error
	switch {
	case strings.HasPrefix(key, CrdsyncElection.prefix()):
		if delete(t.candidates, key); r != nil {
			t.candidates[key] = *r
		}
		return
	case ofNode && name != egress.Unselected: // the same as by egress
		return
	case ofNode && r == nil:
		t.unselected.drop(node)
	case ofNode:
		err = t.unselected.put(node, *r)
	case strings.HasPrefix(key, BlockPrefix) && r == nil:
		delete(t.blocks, key)
	case strings.HasPrefix(key, BlockPrefix):
		var b egress.Block
		if b, err = DecodeBlock(key, *r); err == nil {
			t.blocks[key] = b
		}
	default:
		t.tables.apply(key, r, first)
		return
	}
	if delete(t.faults, key); err != nil {
		t.faults[key] = egress.Fault{Key: key, Err: err}
	}
}

// whole returns what the tables hold. Nothing in it changes afterwards.
func (t *wholeTables) whole(revision int64) Whole {
	w := Whole{Everything: t.everything(revision), Unselected: t.unselected.share(), Blocks: slices.SortedFunc(maps.Values(t.blocks), CompareBlocks)}
	first := int64(0)
	for _, r := range t.candidates {
		if first == 0 || r.Revision < first { // who stands longest leads
			first, w.Leader = r.Revision, string(r.Value)
		}
	}
	return w
}

// WholeView is a Whole that is kept equal to etcd, with the tenures of all IPs. It is safe for concurrent use.
type WholeView struct {
	cache *Cache

	mu      sync.Mutex // guards what follows
	listed  bool
	tables  *wholeTables
	tenures map[string]tenure // by key
}

// tenure is a Tenure, and the revision of its key.
type tenure struct {
	egress.Tenure
	revision int64
}

// NewWholeView returns a view of all that etcd holds. It is empty until Run has listed it.
func (c *Client) NewWholeView() *WholeView {
	k := c.NewCache(append(slices.Clone(wholePrefixes), HistoryPrefix)...)
	k.Track()
	return &WholeView{cache: k, tables: newWholeTables(), tenures: map[string]tenure{}}
}

// Run keeps the view equal to etcd until ctx ends, and then returns the error of ctx; see Cache.Run.
func (v *WholeView) Run(ctx context.Context) error { return v.cache.Run(ctx) }

// Changed returns a channel that delivers once whenever there is something new since the last receive.
func (v *WholeView) Changed() <-chan struct{} { return v.cache.Changed() }

// Healthy reports whether the view follows etcd at present; see Cache.Healthy.
func (v *WholeView) Healthy() bool { return v.cache.Healthy() }

// Whole returns etcd as it was at one revision, and the tenures of all IPs in the order in which etcd took them; ok is
// false before the first whole list. Nothing in it ever changes. Of a record that cannot be read the last value that
// could be, if any, stands; a tenure that cannot be is left out.
func (v *WholeView) Whole() (w Whole, tenures []egress.Tenure, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	changed, is, ok := v.cache.take()
	if !ok {
		return w, nil, false
	}
	for key, r := range changed {
		if !strings.HasPrefix(key, HistoryPrefix) {
			v.tables.apply(key, r, !v.listed)
			continue
		}
		delete(v.tenures, key)
		if r == nil {
			continue
		}
		// else it is the history of one IP that says so (Client.History)
		if t, err := Decode[egress.Tenure](*r); err == nil {
			v.tenures[key] = tenure{t, r.Revision}
		}
	}
	v.listed = true
	sorted := slices.SortedFunc(maps.Values(v.tenures), func(a, b tenure) int { return cmp.Compare(a.revision, b.revision) })
	for _, t := range sorted {
		tenures = append(tenures, t.Tenure)
	}
	return v.tables.whole(is.revision), tenures, true
}

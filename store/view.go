package store

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/egress"
)

// View is what the agent of one node sees of etcd: pools, egresses, nodes, Service CIDRs, pods' ranges, agents, moves,
// pins, cordons, suspicions, the members of its own node, and what its Scope says. It is safe for concurrent use.
type View struct {
	node  string
	cache *Cache

	mu     sync.Mutex // guards what follows
	scope  Scope
	is     state // of last
	asked  Scope // when last was made
	tables *tables
	last   *egress.Snapshot
}

// Scope is what the view of a node watches beside what that of every node does.
type Scope struct {
	Egresses []string // those whose members it watches, on all nodes
	// Narrow: it watches the owners of the egress IPs Owners alone. Else it watches all.
	Narrow bool
	Owners []netip.Addr
}

func (s Scope) equal(o Scope) bool {
	return slices.Equal(s.Egresses, o.Egresses) && s.Narrow == o.Narrow && slices.Equal(s.Owners, o.Owners)
}

// NewView returns the view of a node, of the zero Scope. It is empty until Run has listed it.
func (c *Client) NewView(node string) *View {
	k := c.NewCache(ViewRanges(node, Scope{})...)
	k.Track()
	return &View{node: node, cache: k, tables: newTables(node)}
}

// ViewRanges returns the ranges that the view of a node watches.
func ViewRanges(node string, scope Scope) []string {
	ranges := append(slices.Clone(control), MembersByNodeKey(node, ""))
	for _, name := range scope.Egresses {
		ranges = append(ranges, MembersByEgressKey(name, ""))
	}
	if !scope.Narrow {
		return append(ranges, OwnerPrefix)
	}
	for _, ip := range scope.Owners {
		ranges = append(ranges, OwnerKey(ip))
	}
	return ranges
}

// control are the prefixes of the records that every agent watches whole.
var control = []string{PoolPrefix, EgressPrefix, NodePrefix, ServicePrefix, PodPrefix, AgentPrefix, MovePrefix, PinPrefix, CordonPrefix, SuspicionPrefix, PermitKey}

// Run keeps the view equal to etcd until ctx ends, and then returns the error of ctx; see Cache.Run.
func (v *View) Run(ctx context.Context) error { return v.cache.Run(ctx) }

// Ready returns a channel that is closed after the first whole list.
func (v *View) Ready() <-chan struct{} { return v.cache.Ready() }

// Changed returns a channel that delivers once whenever there is something new since the last receive.
func (v *View) Changed() <-chan struct{} { return v.cache.Changed() }

// Healthy reports whether the view follows etcd at present; see Cache.Healthy.
func (v *View) Healthy() bool { return v.cache.Healthy() }

// Arrived returns when the first change came since the last call; see Cache.Arrived. All of them are in the next
// Snapshot.
func (v *View) Arrived() time.Time { return v.cache.Arrived() }

// Snapshot returns etcd as it was at one revision, nil before the first whole list. It is the same pointer while
// nothing changes, and nothing in it ever changes. A record that cannot be read (no JSON, key and value disagree, an
// invalid address or id) is in Faults, and the last value of its key that could be read, if any, stands.
func (v *View) Snapshot() *egress.Snapshot {
	v.mu.Lock()
	defer v.mu.Unlock()
	changed, is, ok := v.cache.take()
	if !ok {
		return nil
	}
	if v.last != nil && len(changed) == 0 && slices.Equal(is.whole, v.is.whole) && is.restores == v.is.restores && v.asked.equal(v.scope) {
		return v.last
	}
	for key, r := range changed {
		v.tables.apply(key, r, v.last == nil)
	}
	v.last, v.is, v.asked = v.tables.snapshot(is.revision), is, v.scope
	v.last.Restores, v.last.Partial = is.restores, !slices.Contains(is.whole, OwnerPrefix)
	v.last.Followed = map[string]bool{}
	for _, name := range v.scope.Egresses {
		if slices.Contains(is.whole, MembersByEgressKey(name, "")) {
			v.last.Followed[name] = true
		}
	}
	return v.last
}

// Watch says what to see from now on. What is new comes with a later snapshot, and until then the snapshots say that it
// is not there: see egress.Snapshot.Followed and Partial. It costs nothing when the scope is the same as before.
func (v *View) Watch(scope Scope) {
	v.mu.Lock()
	defer v.mu.Unlock()
	scope.Egresses = slices.Compact(slices.Sorted(slices.Values(scope.Egresses)))
	scope.Owners = slices.Compact(slices.SortedFunc(slices.Values(scope.Owners), netip.Addr.Compare))
	if !scope.Narrow {
		scope.Owners = nil
	}
	if scope.equal(v.scope) {
		return
	}
	v.scope = scope
	v.cache.SetPrefixes(ViewRanges(v.node, scope)...)
}

// Everything is all that etcd holds but the members, the blocks of ports and the ids.
type Everything struct {
	egress.Snapshot
	Allocations []egress.Allocation // sorted by IP
}

// ReadAll reads everything at one revision. Records that cannot be read are in Faults.
func (c *Client) ReadAll(ctx context.Context) (Everything, error) {
	list, err := c.list(ctx, append(slices.Clone(control), OwnerPrefix, AllocationPrefix), 0)
	if err != nil {
		return Everything{}, fmt.Errorf("reading etcd: %w", err)
	}
	t := newTables("")
	for key, r := range list.records {
		t.apply(key, &r, true)
	}
	return t.everything(list.revision), nil
}

func (t *tables) everything(revision int64) Everything {
	all := Everything{Snapshot: *t.snapshot(revision)}
	for _, ip := range slices.SortedFunc(maps.Keys(t.allocations.m), netip.Addr.Compare) {
		all.Allocations = append(all.Allocations, t.allocations.m[ip])
	}
	return all
}

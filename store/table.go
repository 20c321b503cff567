package store

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
)

// table has the decoded records of one kind, by the last part of their keys.
type table[K comparable, V any] struct {
	below  string
	parse  func(string) (K, error)
	check  func(K, V) error
	m      map[K]V
	shared bool // a snapshot has m, which must not be changed
}

// kind is a table, whatever its records are.
type kind interface {
	prefix() string
	put(name string, r Record) error
	drop(name string)
}

func (t *table[K, V]) prefix() string { return t.below }

// put reads a record. When that cannot be done, the former one of the key stands.
func (t *table[K, V]) put(name string, r Record) error {
	k, err := t.parse(name)
	if err != nil {
		return err
	}
	v, err := Decode[V](r)
	if err != nil {
		return err
	}
	if err := t.check(k, v); err != nil {
		return err
	}
	t.unshare()
	t.m[k] = v
	return nil
}

func (t *table[K, V]) drop(name string) {
	if k, err := t.parse(name); err == nil { // else it was never put
		t.unshare()
		delete(t.m, k)
	}
}

// unshare makes m safe to change, by a copy where a snapshot has it.
func (t *table[K, V]) unshare() {
	if t.m == nil {
		t.m = map[K]V{}
	} else if t.shared {
		t.m = maps.Clone(t.m)
	}
	t.shared = false
}

// share returns m for a snapshot. The next change is made to a copy.
func (t *table[K, V]) share() map[K]V {
	t.shared = true
	return t.m
}

// tables are the records of all kinds that were read, and the faults of those that could not be.
type tables struct {
	pools       table[string, egress.Pool]
	egresses    table[string, egress.Policy]
	allocations table[netip.Addr, egress.Allocation]
	nodes       table[string, egress.Node]
	services    table[string, egress.ServiceCIDR]
	pods        table[string, egress.PodRanges]
	agents      table[string, egress.Agent]
	owners      table[netip.Addr, egress.Owner]
	moves       table[netip.Addr, egress.Move]
	pins        table[netip.Addr, egress.Pin]
	cordons     table[string, egress.Cordon]
	suspicions  table[string, egress.Suspicion]
	permits     table[string, egress.Permits]
	byNode      table[string, egress.Members]
	byEgress    table[membersKey, egress.Members]

	nested map[string]map[string]egress.Members // byEgress as last handed out
	faults map[string]egress.Fault
}

// newTables returns tables whose byNode is that of one node; empty: of none.
func newTables(node string) *tables {
	return &tables{
		pools:       table[string, egress.Pool]{below: PoolPrefix, parse: parseName, check: checkPool},
		egresses:    table[string, egress.Policy]{below: EgressPrefix, parse: parseName, check: checkPolicy},
		allocations: table[netip.Addr, egress.Allocation]{below: AllocationPrefix, parse: parseIP, check: checkAllocation},
		nodes:       table[string, egress.Node]{below: NodePrefix, parse: parseName, check: checkNode},
		services:    table[string, egress.ServiceCIDR]{below: ServicePrefix, parse: parseName, check: checkService},
		pods:        table[string, egress.PodRanges]{below: PodPrefix, parse: parseName, check: checkPodRanges},
		agents:      table[string, egress.Agent]{below: AgentPrefix, parse: parseName, check: checkAgent},
		owners:      table[netip.Addr, egress.Owner]{below: OwnerPrefix, parse: parseIP, check: checkOwner},
		moves:       table[netip.Addr, egress.Move]{below: MovePrefix, parse: parseIP, check: checkMove},
		pins:        table[netip.Addr, egress.Pin]{below: PinPrefix, parse: parseIP, check: checkPin},
		cordons:     table[string, egress.Cordon]{below: CordonPrefix, parse: parseName, check: checkCordon},
		suspicions:  table[string, egress.Suspicion]{below: SuspicionPrefix, parse: parseName, check: checkSuspicion},
		permits:     table[string, egress.Permits]{below: PermitKey, parse: parseNothing, check: checkPermits},
		byNode: table[string, egress.Members]{
			below: MembersByNodeKey(node, ""), parse: parseName,
			check: func(name string, m egress.Members) error { return checkMembers(membersKey{name, node}, m) },
		},
		byEgress: table[membersKey, egress.Members]{below: MembersByEgress, parse: parseMembers, check: checkMembers},
		faults:   map[string]egress.Fault{},
	}
}

func (t *tables) kinds() []kind {
	return []kind{
		&t.pools, &t.egresses, &t.allocations, &t.nodes, &t.services, &t.pods, &t.agents, &t.owners, &t.moves, &t.pins, &t.cordons, &t.suspicions, &t.permits, &t.byNode, &t.byEgress,
	}
}

// apply takes in one key's record, nil when it is gone; first says whether it is of the first snapshot.
func (t *tables) apply(key string, r *Record, first bool) {
	was := t.faults[key]
	delete(t.faults, key)
	for _, k := range t.kinds() {
		name, ok := strings.CutPrefix(key, k.prefix())
		if !ok {
			continue
		}
		if r == nil {
			k.drop(name)
		} else if err := k.put(name, *r); err != nil {
			t.faults[key] = egress.Fault{Key: key, Err: err, Blind: first || was.Blind}
		}
		return
	}
}

// snapshot returns what the tables hold. Nothing in it changes afterwards.
func (t *tables) snapshot(revision int64) *egress.Snapshot {
	s := &egress.Snapshot{
		Revision: revision,
		Pools:    t.pools.share(), Egresses: t.egresses.share(), Nodes: t.nodes.share(), Services: t.services.share(), Pods: t.pods.share(), Agents: t.agents.share(), Owners: t.owners.share(),
		Moves: t.moves.share(), Pins: t.pins.share(), Cordons: t.cordons.share(), Suspicions: t.suspicions.share(), ByNode: t.byNode.share(),
		Longest: time.Duration(t.permits.m[""].Longest),
	}
	if !t.byEgress.shared {
		t.nested = map[string]map[string]egress.Members{}
		for k, m := range t.byEgress.share() {
			if t.nested[k.egress] == nil {
				t.nested[k.egress] = map[string]egress.Members{}
			}
			t.nested[k.egress][k.node] = m
		}
	}
	s.ByEgress = t.nested
	s.Faults = slices.AppendSeq(s.Faults, maps.Values(t.faults))
	slices.SortFunc(s.Faults, func(a, b egress.Fault) int { return cmp.Compare(a.Key, b.Key) })
	return s
}

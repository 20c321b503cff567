package plan

import (
	"cmp"
	"maps"
	"math"
	"net/netip"
	"reflect"
	"slices"

	"github.com/egret-project/egret/egress"
)

// Cluster is a snapshot of etcd, with indexes that are the same on every node. Each is computed once, when a method
// first needs it. It is for one goroutine.
type Cluster struct {
	*egress.Snapshot
	targets []target            // oldest egress first
	byIP    map[netip.Addr]int  // in targets
	able    map[string][]string // pool -> Candidates
	owned   map[string]int      // node -> Owned; nil: not computed yet
	// By node, what Held returns, and the targets that nobody owns, in order; nil: not computed yet.
	held    map[string]map[netip.Addr]egress.Owner
	unowned []target
	// What a kernel has of all nodes, and of all egress IPs, as Build used it last; nil: not computed yet.
	around          *around
	sources, pooled []netip.Addr
}

// New returns the Cluster of a snapshot.
func New(s *egress.Snapshot) *Cluster { return (*Cluster)(nil).With(s) }

// With returns the Cluster of another snapshot; what has not changed since c, which may be nil, is not computed anew.
func (c *Cluster) With(s *egress.Snapshot) *Cluster {
	if c != nil && c.Snapshot == s {
		return c
	}
	next := &Cluster{Snapshot: s, able: map[string][]string{}}
	if c != nil && Same(c.Egresses, s.Egresses) {
		next.targets, next.byIP, next.sources, next.pooled = c.targets, c.byIP, c.sources, c.pooled
	} else {
		next.index()
	}
	if c != nil && Same(c.Pools, s.Pools) && Same(c.Nodes, s.Nodes) && Same(c.Agents, s.Agents) && Same(c.Cordons, s.Cordons) {
		next.able = c.able
	}
	if c != nil && Same(c.Nodes, s.Nodes) && Same(c.Pods, s.Pods) && Same(c.Services, s.Services) {
		next.around = c.around
	}
	if c == nil || !Same(c.Owners, s.Owners) {
		return next
	}
	next.held = c.held
	if Same(c.Egresses, s.Egresses) {
		next.unowned = c.unowned
		if Same(c.Moves, s.Moves) {
			next.owned = c.owned
		}
	}
	return next
}

// Same reports whether two maps of snapshots are one map: maps of snapshots are never changed.
func Same[K comparable, V any](a, b map[K]V) bool {
	return reflect.ValueOf(a).UnsafePointer() == reflect.ValueOf(b).UnsafePointer()
}

// target is one egress IP, as the egresses that use it describe it.
type target struct {
	egress.Address
	egresses  []string          // sorted
	created   int64             // of the oldest, Unix nanoseconds
	bandwidth *egress.Bandwidth // the one with the lowest rate; nil: none sets a limit
	// partner is the other address of the egress that a pool IP belongs to: both live on one node. The zero Address:
	// there is none.
	partner egress.Address
}

// leads reports whether the partner goes where the target is, rather than the other way round. A static IP does not
// move.
func (t target) leads() bool { return t.partner.Pool != "" && t.IP.Less(t.partner.IP) }

// index finds the egress IPs of the snapshot.
func (c *Cluster) index() {
	byIP := map[netip.Addr]*target{}
	for _, name := range slices.Sorted(maps.Keys(c.Egresses)) {
		p := c.Egresses[name]
		for _, a := range p.Addresses {
			t := byIP[a.IP]
			if t == nil {
				t = &target{Address: a, created: p.Created.UnixNano()}
				byIP[a.IP] = t
				if i := slices.IndexFunc(p.Addresses, func(o egress.Address) bool { return o.IP != a.IP }); a.Pool != "" && i >= 0 {
					t.partner = p.Addresses[i]
				}
			}
			t.egresses = append(t.egresses, name)
			t.created = min(t.created, p.Created.UnixNano())
			if b := p.Bandwidth; b != nil && (t.bandwidth == nil || b.Rate < t.bandwidth.Rate) {
				t.bandwidth = b
			}
		}
	}
	c.targets = make([]target, 0, len(byIP))
	for _, t := range byIP {
		c.targets = append(c.targets, *t)
	}
	slices.SortFunc(c.targets, func(a, b target) int {
		return cmp.Or(cmp.Compare(a.created, b.created), a.IP.Compare(b.IP))
	})
	c.byIP = make(map[netip.Addr]int, len(c.targets))
	for i, t := range c.targets {
		c.byIP[t.IP] = i
	}
}

// target returns what the egresses say of an IP; used is false where none uses it.
func (c *Cluster) target(ip netip.Addr) (t target, used bool) {
	i, used := c.byIP[ip]
	if used {
		t = c.targets[i]
	}
	return t, used
}

// PoolOf returns the pool of an egress IP; empty: it is static, or unused.
func (c *Cluster) PoolOf(ip netip.Addr) string {
	t, _ := c.target(ip)
	return t.Pool
}

// EgressesOf returns the egresses that use an egress IP, sorted. What it returns is not to be changed.
func (c *Cluster) EgressesOf(ip netip.Addr) []string {
	t, _ := c.target(ip)
	return t.egresses
}

// Together returns ip and, if there is one, the other pool IP of its egress: they live on one node.
func (c *Cluster) Together(ip netip.Addr) []netip.Addr {
	if t, _ := c.target(ip); t.partner.Pool != "" {
		return []netip.Addr{ip, t.partner.IP}
	}
	return []netip.Addr{ip}
}

// Candidates returns the nodes that may own the IPs of a pool, capacity left aside: those that the pool selects, with a
// live agent that can serve it and is not about to restart, and that are not cordoned. What a node holds while its
// agent restarts it keeps. Sorted. A pool that is not there has none. What it returns is not to be changed.
func (c *Cluster) Candidates(pool string) []string {
	p, ok := c.Pools[pool]
	if !ok {
		return nil
	}
	out, known := c.able[pool]
	if known {
		return out
	}
	for name := range c.Agents {
		if a := c.Agents[name]; mayOwn(c.Snapshot, p, name) && a.Refused[pool] == "" && !a.Restarting {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	c.able[pool] = out
	return out
}

// Owned returns how many pool IPs a node owns, or is about to own by a planned move.
func (c *Cluster) Owned(node string) int {
	if c.owned == nil {
		c.owned = map[string]int{}
		for _, t := range c.targets {
			o, owned := c.Owners[t.IP]
			if !owned || t.Pool == "" {
				continue
			}
			c.owned[o.Node]++
			if m, moving := c.Moves[t.IP]; moving && m.To != o.Node {
				c.owned[m.To]++
			}
		}
	}
	return c.owned[node]
}

// Held returns the locks that a node has, by egress IP, whatever lease they are under. What it returns is not to be
// changed.
func (c *Cluster) Held(node string) map[netip.Addr]egress.Owner {
	if c.held == nil {
		c.held = map[string]map[netip.Addr]egress.Owner{}
		for ip, o := range c.Owners {
			if c.held[o.Node] == nil {
				c.held[o.Node] = map[netip.Addr]egress.Owner{}
			}
			c.held[o.Node][ip] = o
		}
	}
	return c.held[node]
}

// free returns the targets that nobody owns, oldest egress first. What it returns is not to be changed.
func (c *Cluster) free() []target {
	if c.unowned == nil {
		c.unowned = []target{}
		for _, t := range c.targets {
			if _, owned := c.Owners[t.IP]; !owned {
				c.unowned = append(c.unowned, t)
			}
		}
	}
	return c.unowned
}

// allSources returns all egress IPs, and those of pools. What it returns is not to be changed.
func (c *Cluster) allSources() (all, pooled []netip.Addr) {
	if c.sources == nil {
		for _, t := range c.targets {
			if c.sources = append(c.sources, t.IP); t.Pool != "" {
				c.pooled = append(c.pooled, t.IP)
			}
		}
		c.sources, c.pooled = slices.Clip(c.sources), slices.Clip(c.pooled)
	}
	return c.sources, c.pooled
}

// FreeCapacity returns how many more pool IPs a node may take; math.MaxInt: it has no limit.
func (c *Cluster) FreeCapacity(node string) int {
	limit := c.Nodes[node].Capacity
	if limit == 0 {
		return math.MaxInt
	}
	return max(limit-c.Owned(node), 0)
}

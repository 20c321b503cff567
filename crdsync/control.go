package crdsync

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// objects are what the Kubernetes API shows, pods left out.
type objects struct {
	demands []demand // oldest first
	pools   map[string]egress.Pool
	unread  map[string]error // pools that cannot be read, and why
	overlap map[string]error // pools that have addresses of older ones
	nodes   []egress.Node    // by name; their indexes are not set
	// services are the Service CIDRs; nil: they cannot be read, and what etcd holds stands.
	services []egress.ServiceCIDR
}

// verdict is the result for an egress, from which its status is made.
type verdict struct {
	name       string
	uid        types.UID // of the object, of which there may be another by this name now
	generation int64
	addresses  []egress.Address
	err        error  // what is wrong with it; nil: nothing
	duplicate  error  // the addresses that it asks for and others have; nil: none
	overlap    string // which of its pods are others'; empty: none
	ports      string // which nodes have too few ports; empty: none
}

// control is what etcd has to have, members left out, and what the statuses are to say about it.
type control struct {
	values    map[string]any  // key -> record
	keep      map[string]bool // keys that stand as they are
	pools     map[string]egress.Pool
	nodes     []egress.Node // by name
	claimants []claimant    // in order of precedence
	verdicts  map[string]verdict
	usage     map[string]v1beta1.IPPoolUsage
	pressed   map[string]string   // the pools whose IPs have too few ports, and which
	faults    map[string]error    // by "node <name>" and the like
	had       map[netip.Addr]bool // the addresses that an egress has in etcd
}

// newControl returns what etcd has to have, given what it has. frozen reports whether etcd lists a pod as one of an
// egress.
func newControl(o objects, have records, now time.Time, frozen func(egressName string, p pod) bool) control {
	c := control{values: map[string]any{}, keep: map[string]bool{}, verdicts: map[string]verdict{}, faults: map[string]error{}}
	pools := maps.Clone(o.pools)
	c.pools, c.nodes, c.had = pools, o.nodes, map[netip.Addr]bool{}
	for _, p := range have.policies {
		for _, a := range p.Addresses {
			c.had[a.IP] = true
		}
	}
	for name, p := range pools {
		c.values[store.PoolKey(name)] = p
	}
	for name, err := range o.unread {
		c.faults["pool "+name] = err
		c.keep[store.PoolKey(name)] = true
		if p, ok := have.pools[name]; ok {
			pools[name] = p
		}
	}
	for name, err := range o.overlap {
		c.faults["pool "+name] = err
	}
	requests := make([]request, len(o.demands))
	for i, d := range o.demands {
		requests[i] = request{name: d.name, keep: d.addressErr != nil, prefer: presentAndFormer(have.policies[d.name])}
		for _, ip := range d.statusIPs {
			requests[i].prefer = append(requests[i].prefer, egress.Address{IP: ip})
		}
		switch lost := unreadable(d, pools, o.unread); {
		case lost != nil:
			requests[i].keep = true
		case d.addressErr == nil:
			requests[i].wants = wants(d, pools, o.unread)
			requests[i].lost = takenAway(d, pools, have)
		}
	}
	out := allocate(requests, pools, o.nodeAddresses(), have.allocations)
	for _, d := range o.demands {
		out[d.name].err = errors.Join(out[d.name].err, o.poolFaults(d))
	}
	c.count(idCounter, int(number(requests, out, have.ids, egress.ID(have.counters[idCounter].Last))))
	for i, d := range o.demands {
		c.addEgress(d, requests[i].wants, *out[d.name], pools, have, frozen)
	}
	c.addAllocations(o.demands, out, have, now)
	c.addNodes(o.nodes, have)
	c.addServices(o.services, have)
	c.usage = map[string]v1beta1.IPPoolUsage{}
	for name, p := range pools {
		c.usage[name] = v1beta1.IPPoolUsage{Total: p.Total()}
	}
	for _, v := range c.values {
		if a, ok := v.(egress.Allocation); ok && a.Pool != "" {
			u := c.usage[a.Pool]
			u.Used++
			c.usage[a.Pool] = u
		}
	}
	return c
}

// takenAway returns the addresses that an egress has of a pool which is still there and no longer has them: the range
// was taken away past the webhook. A pool that was deleted and made anew is another one.
func takenAway(d demand, pools map[string]egress.Pool, have records) map[netip.Addr]error {
	out := map[netip.Addr]error{}
	for _, a := range have.policies[d.name].Addresses {
		p, ok := pools[a.Pool]
		if ok && have.allocations[a.IP].PoolUID == p.UID && slices.Contains(d.pools, a.Pool) && !p.Contains(a.IP) {
			out[a.IP] = fmt.Errorf(
				"%s was taken out of pool %s while in use, and is kept: want its range back, or egressIP set to another address", a.IP, a.Pool,
			)
		}
	}
	return out
}

// unreadable returns an error when a pool that the egress names can be read neither in the API nor in etcd: nothing can
// be said of its addresses then, so the egress keeps what it has.
func unreadable(d demand, pools map[string]egress.Pool, unread map[string]error) error {
	for _, name := range d.pools {
		if _, ok := pools[name]; !ok && unread[name] != nil {
			return fmt.Errorf("pool %s cannot be read: %w", name, unread[name])
		}
	}
	return nil
}

// nodeAddresses returns the nodes' own addresses, and whose they are.
func (o objects) nodeAddresses() map[netip.Addr]string {
	out := map[netip.Addr]string{}
	for _, n := range o.nodes {
		for _, ip := range n.Addresses {
			out[ip] = n.Name
		}
	}
	return out
}

// poolFaults returns what is wrong with the pools that an egress names, for its status: a pool's own has no place for
// it.
func (o objects) poolFaults(d demand) error {
	var errs []error
	for _, name := range d.pools {
		if err := o.unread[name]; err != nil {
			errs = append(errs, fmt.Errorf("pool %s cannot be read: %w", name, err))
		}
		if err := o.overlap[name]; err != nil {
			errs = append(errs, fmt.Errorf("pool %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func (c *control) addEgress(d demand, ws []want, o outcome, pools map[string]egress.Pool, have records, frozen func(string, pod) bool) {
	p := egress.Policy{
		Name: d.name, Addresses: append([]egress.Address{}, o.addresses...), Former: former(d, o, have.policies[d.name]), Bandwidth: d.bandwidth, Created: d.created, Generation: d.generation,
	}
	if d.bandwidthErr != nil {
		p.Bandwidth = have.policies[d.name].Bandwidth
	}
	c.values[store.EgressKey(d.name)] = p
	v := verdict{name: d.name, uid: d.uid, generation: d.generation, addresses: p.Addresses, err: d.err(), duplicate: o.duplicate}
	if v.err == nil {
		v.err = o.err
	} else {
		c.faults["egress "+d.name] = v.err
	}
	c.verdicts[d.name] = v
	claim := claimant{name: d.name, families: claimed(ws, o, pools), applied: d.applied}
	if d.selectorErr != nil { // the pods that it has stay its
		claim.frozen = func(p pod) bool { return frozen(d.name, p) }
	}
	c.claimants = append(c.claimants, claim)
}

// presentAndFormer returns the addresses that an egress has, and those that it had.
func presentAndFormer(p egress.Policy) []egress.Address { return slices.Concat(p.Addresses, p.Former) }

// former returns the addresses that an egress has to get again once their pool has them: the last one of each family in
// which it has none now.
func former(d demand, o outcome, was egress.Policy) (out []egress.Address) {
	for _, a := range presentAndFormer(was) {
		if slices.Contains(d.pools, a.Pool) && !o.has(familyOf(a.IP)) && !(outcome{addresses: out}).has(familyOf(a.IP)) {
			out = append(out, a)
		}
	}
	return out
}

// claimed returns the families of the pod IPs that an egress takes: those of the addresses that it has or waits for.
// Where they are not known it takes both, so that no pod leaves with another address meanwhile.
func claimed(ws []want, o outcome, pools map[string]egress.Pool) []family {
	found := map[family]bool{}
	for _, a := range o.addresses {
		found[familyOf(a.IP)] = true
	}
	for _, w := range ws {
		fs := poolFamilies(pools[w.pool])
		switch {
		case w.ip.IsValid():
			fs = []family{familyOf(w.ip)}
		case len(fs) == 0:
			fs = families
		case slices.ContainsFunc(fs, func(f family) bool { return found[f] }):
			fs = nil // of a pool of both families, the egress has its one address
		}
		for _, f := range fs {
			found[f] = true
		}
	}
	if len(found) == 0 {
		return families
	}
	return slices.DeleteFunc(slices.Clone(families), func(f family) bool { return !found[f] })
}

func (c *control) addAllocations(demands []demand, out map[string]*outcome, have records, now time.Time) {
	wanted := map[netip.Addr]egress.Allocation{}
	for _, d := range demands {
		for _, a := range out[d.name].addresses {
			w, ok := wanted[a.IP]
			if !ok {
				w = egress.Allocation{IP: a.IP, Pool: a.Pool, PoolUID: c.pools[a.Pool].UID, ID: a.ID, Since: now}
				if h, ok := have.allocations[a.IP]; ok {
					w.Since = h.Since
				}
			}
			w.Egresses = append(w.Egresses, d.name)
			wanted[a.IP] = w
		}
	}
	for ip, w := range wanted {
		slices.Sort(w.Egresses)
		c.values[store.AllocationKey(ip)] = w
		c.values[store.IDKey(w.ID)] = egress.IDRecord{ID: w.ID, IP: ip}
	}
	for key, err := range have.faults {
		c.faults[key] = err
		if _, ok := c.values[key]; !ok && strings.HasPrefix(key, store.AllocationPrefix) {
			c.keep[key] = true // it is not known whose address it is
		}
	}
}

func (c *control) addServices(services []egress.ServiceCIDR, have records) {
	for _, s := range services {
		c.values[store.ServiceKey(s.Name)] = s
	}
	if services == nil {
		for name := range have.services {
			c.keep[store.ServiceKey(name)] = true
		}
	}
}

func (c *control) count(key string, last int) {
	if last != 0 {
		c.values[key] = counter{last}
	}
}

func (c *control) addNodes(nodes []egress.Node, have records) {
	nodes = slices.Clone(nodes)
	for i, n := range nodes {
		nodes[i].Index = have.nodes[n.Name].Index
	}
	c.count(indexCounter, indexNodes(nodes, have.counters[indexCounter].Last))
	for _, n := range nodes {
		if n.Index == 0 {
			c.faults["index of node "+n.Name] = fmt.Errorf("no index is left: %d nodes have one", egress.MaxNodeIndex)
			continue
		}
		c.values[store.NodeKey(n.Name)] = n
	}
}

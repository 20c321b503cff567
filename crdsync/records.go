package crdsync

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// The keys of counters: the id, and the index of a node, that was given out last, so that the next one is another, even
// when the last was given back meanwhile.
const (
	idCounter    = store.CounterPrefix + "ids"
	indexCounter = store.CounterPrefix + "indexes"
)

type counter struct {
	Last int `json:"last"`
}

// records are crdsync's own records as etcd shows them, members left out.
type records struct {
	pools       map[string]egress.Pool
	policies    map[string]egress.Policy
	allocations map[netip.Addr]egress.Allocation
	ids         map[egress.ID]netip.Addr // of the allocations too
	nodes       map[string]egress.Node
	counters    map[string]counter // by key
	services    map[string]egress.ServiceCIDR
	// faults are the records that cannot be read, by key. Those of allocations are in allocations all the same, without
	// an egress when none is known to use the address.
	faults map[string]error
}

// readRecords reads what the cache shows.
func readRecords(cache *store.Cache) records {
	r := records{faults: map[string]error{}, allocations: map[netip.Addr]egress.Allocation{}, ids: map[egress.ID]netip.Addr{}}
	r.pools = decodeAll[egress.Pool](cache, store.PoolPrefix, r.faults)
	r.policies = decodeAll[egress.Policy](cache, store.EgressPrefix, r.faults)
	r.nodes = decodeAll[egress.Node](cache, store.NodePrefix, r.faults)
	r.services = decodeAll[egress.ServiceCIDR](cache, store.ServicePrefix, r.faults)
	r.counters = map[string]counter{}
	for name, c := range decodeAll[counter](cache, store.CounterPrefix, r.faults) {
		r.counters[store.CounterPrefix+name] = c
	}
	for name, a := range decodeAll[egress.Allocation](cache, store.AllocationPrefix, r.faults) {
		if ip, err := netip.ParseAddr(name); err == nil && a.IP == ip && a.ID != 0 && a.ID <= egress.MaxID {
			r.allocations[ip] = a
		} else {
			r.faults[store.AllocationPrefix+name] = fmt.Errorf("key and value disagree, or id %d is none", a.ID)
		}
	}
	for key := range r.faults {
		if ip, err := netip.ParseAddr(strings.TrimPrefix(key, store.AllocationPrefix)); err == nil {
			r.allocations[ip] = r.restore(ip)
		}
	}
	for _, i := range decodeAll[egress.IDRecord](cache, store.IDPrefix, r.faults) {
		r.ids[i.ID] = i.IP
	}
	for ip, a := range r.allocations {
		if a.ID != 0 {
			r.ids[a.ID] = ip
		}
	}
	return r
}

// restore returns the allocation of an address from the records of the egresses that have it.
func (r records) restore(ip netip.Addr) egress.Allocation {
	a := egress.Allocation{IP: ip}
	for name, p := range r.policies {
		for _, address := range p.Addresses {
			if address.IP == ip {
				a.ID, a.Pool, a.PoolUID, a.Since = address.ID, address.Pool, r.pools[address.Pool].UID, p.Created
				a.Egresses = append(a.Egresses, name)
			}
		}
	}
	slices.Sort(a.Egresses)
	return a
}

// decodeAll reads the records below a prefix, by the rest of their keys.
func decodeAll[T any](cache *store.Cache, prefix string, faults map[string]error) map[string]T {
	out := map[string]T{}
	for key, r := range cache.List(prefix) {
		v, err := store.Decode[T](r)
		if err != nil {
			faults[key] = err
			continue
		}
		out[strings.TrimPrefix(key, prefix)] = v
	}
	return out
}

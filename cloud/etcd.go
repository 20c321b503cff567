package cloud

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// readState returns what the cache has, and what is known of addresses.
func readState(k *store.Cache, known map[netip.Addr]*address) state {
	s := state{
		owners: map[netip.Addr]egress.Owner{}, nodes: map[string]egress.Node{}, own: map[netip.Addr]own{}, gateways: map[string]bool{},
		allocated: map[netip.Addr]bool{}, records: map[netip.Addr]egress.CloudAddress{},
		revisions: map[netip.Addr]int64{}, holders: map[netip.Addr]string{},
	}
	for key := range k.List(store.AllocationPrefix) {
		if ip, err := netip.ParseAddr(strings.TrimPrefix(key, store.AllocationPrefix)); err == nil {
			s.allocated[ip] = true
		}
	}
	for key, r := range k.List(store.OwnerPrefix) {
		ip, err := netip.ParseAddr(strings.TrimPrefix(key, store.OwnerPrefix))
		if err != nil {
			continue
		}
		o, err := store.DecodeOwner(r)
		switch {
		case err != nil || o.IP != ip || o.Node == "":
			s.allocated[ip] = true // whose it is cannot be read: it stays where it is
		case o.Why != egress.ReasonStatic:
			s.owners[ip] = o
		}
	}
	for key, r := range k.List(store.CloudPrefix) {
		ip, err := netip.ParseAddr(strings.TrimPrefix(key, store.CloudPrefix))
		if record, bad := store.Decode[egress.CloudAddress](r); err == nil && bad == nil && record.IP == ip {
			s.records[ip], s.revisions[ip] = record, r.Revision
		}
	}
	var pools []egress.Pool
	for _, r := range k.List(store.PoolPrefix) {
		if p, err := store.Decode[egress.Pool](r); err == nil {
			pools = append(pools, p)
		}
	}
	for _, r := range k.List(store.NodePrefix) {
		n, err := store.Decode[egress.Node](r)
		if err != nil {
			continue
		}
		s.addNode(n)
		s.gateways[n.Name] = slices.ContainsFunc(pools, func(p egress.Pool) bool {
			return p.NodeSelector.Matches(n.Labels)
		})
	}
	for ip, a := range known {
		if a.read && a.holder != "" {
			s.holders[ip] = a.holder
		}
	}
	return s
}

// ops is the transaction before a call: nobody has become owner since the revision that the steps were decided at,
// what has an owner is allocated, what is released has not been since, and etcd knows which addresses are Egret's.
func (s state) ops(call []step, revision int64) (ops []store.Op, err error) {
	for _, step := range call {
		ops = append(ops, store.Op{Key: store.OwnerKey(step.ip), Still: revision})
		record, recorded := s.records[step.ip]
		allocation := store.Op{Key: store.AllocationKey(step.ip), Exists: true}
		if _, owned := s.owners[step.ip]; !owned {
			allocation = store.Op{Key: store.AllocationKey(step.ip), Still: revision}
		}
		ops = append(ops, allocation)
		op := store.Op{Key: store.CloudKey(step.ip), Revision: s.revisions[step.ip], Absent: !recorded}
		switch holder := s.holders[step.ip]; {
		case step.verb == forget:
			ops = append(ops, op)
			continue
		case recorded && len(record.Asked) == 0, step.verb == unassign:
			continue
		case step.verb == confirm, recorded && record.Egrets(holder):
			record = egress.CloudAddress{IP: step.ip}
		case !slices.Contains(record.Asked, step.iface):
			record = egress.CloudAddress{IP: step.ip, Asked: append(slices.Clone(record.Asked), step.iface)}
		default:
			continue
		}
		if op.Value, err = store.Encode(record); err != nil {
			return nil, err
		}
		ops = append(ops, op)
	}
	return ops, nil
}

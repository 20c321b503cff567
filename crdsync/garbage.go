package crdsync

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// Garbage collection in etcd: keys that operators and agents wrote are dependents of the allocation or the node that
// they are about. The pin and the history of an IP are deleted with its allocation, the cordon and the suspicion of a
// node with its Node object: whoever gets the IP or the name next begins without.

// dependentsOf returns the changes that delete the dependents of an IP's allocation.
func dependentsOf(ip netip.Addr) unit {
	return unit{{Key: store.PinKey(ip)}, {Key: store.HistoryPrefix + ip.String() + "/", Below: true}}
}

// withDependents returns a change with the deletes of its dependents, for one transaction.
func (c control) withDependents(op store.Op) unit {
	u := unit{op}
	if text, ok := strings.CutPrefix(op.Key, store.AllocationPrefix); ok {
		// Of an IP that an egress has already, only the record of the allocation was lost: it is no new one.
		if ip, err := netip.ParseAddr(text); err == nil && (op.Value == nil || op.Absent && !c.had[ip]) {
			u = append(u, dependentsOf(ip)...)
		}
	}
	if node, ok := strings.CutPrefix(op.Key, store.NodePrefix); ok && op.Value == nil && !c.hasNode(node) {
		u = append(u, store.Op{Key: store.CordonKey(node)}, store.Op{Key: store.SuspicionKey(node)})
	}
	return u
}

// hasNode reports whether there is a Node object of the name, with or without a record.
func (c control) hasNode(name string) bool {
	return slices.ContainsFunc(c.nodes, func(n egress.Node) bool { return n.Name == name })
}

// ownerGone notes that the owner of an IP is gone. An owner that gives up an IP adds to its history, also when the IP
// is not allocated any more.
func (m *mirror) ownerGone(key string) {
	ip, err := netip.ParseAddr(strings.TrimPrefix(key, store.OwnerPrefix))
	if _, owned := m.cache.Get(key); err == nil && !owned {
		m.ownerless[ip] = true
	}
}

// dependents returns the changes that delete what owners wrote of IPs after their allocation was deleted.
func (m *mirror) dependents(c control) (out []unit) {
	for ip := range m.ownerless {
		key := store.AllocationKey(ip)
		if _, allocated := m.cache.Get(key); !allocated && c.values[key] == nil {
			out = append(out, append(unit{{Key: key, Absent: true}}, dependentsOf(ip)...))
		}
	}
	return out
}

// garbagePage is how many keys are read at once.
const garbagePage = 1000

// collectGarbage deletes the dependents that are left from before this leadership: of IPs and nodes that went while
// nobody led, or under an older crdsync. It is for after the first pass, which has written all allocations and nodes.
// Each delete requires that etcd has no record of the IP or node; where the cache shows one, no transaction is tried.
func collectGarbage(ctx context.Context, c *store.Client, lead *store.Leadership, cache *store.Cache, now control) error {
	ask := func(record string, u unit) error {
		if _, there := cache.Get(record); there {
			return nil
		}
		err := lead.Commit(ctx, append(unit{{Key: record, Absent: true}}, u...)...)
		if errors.Is(err, store.ErrConflict) {
			return nil
		}
		return err
	}
	last := ""
	for _, prefix := range []string{store.PinPrefix, store.HistoryPrefix, store.CordonPrefix, store.SuspicionPrefix} {
		err := c.EachKey(ctx, prefix, garbagePage, func(key string) error {
			name, _, _ := strings.Cut(strings.TrimPrefix(key, prefix), "/")
			if name == last { // of one IP there are many keys
				return nil
			}
			last = name
			if prefix == store.CordonPrefix || prefix == store.SuspicionPrefix {
				if now.hasNode(name) {
					return nil
				}
				return ask(store.NodeKey(name), unit{{Key: key}})
			}
			ip, err := netip.ParseAddr(name)
			if err != nil || now.values[store.AllocationKey(ip)] != nil {
				return nil // of the former, nobody knows what it is
			}
			return ask(store.AllocationKey(ip), dependentsOf(ip))
		})
		if last = ""; err != nil {
			return err
		}
	}
	return nil
}

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

// What operators and agents wrote of an IP or a node goes with it: the pin and the history of an IP that is allocated no more, the cordon of, and a suspicion against, a
// node whose Node object is gone. An IP that is given out anew has neither from before.

// remainsOf returns the changes that take away what is left of an IP.
func remainsOf(ip netip.Addr) unit {
	return unit{{Key: store.PinKey(ip)}, {Key: store.HistoryPrefix + ip.String() + "/", Below: true}}
}

// withRemains returns a change with what has to go along with it, in one transaction.
func (c control) withRemains(op store.Op) unit {
	u := unit{op}
	if text, ok := strings.CutPrefix(op.Key, store.AllocationPrefix); ok {
		// Of an IP that an egress has already, only the record of the allocation was lost: it is no new one.
		if ip, err := netip.ParseAddr(text); err == nil && (op.Value == nil || op.Absent && !c.had[ip]) {
			u = append(u, remainsOf(ip)...)
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

// ownerGone notes that the owner of an IP is gone: where the IP is allocated no more, its history has the owner's last words.
func (m *mirror) ownerGone(key string) {
	ip, err := netip.ParseAddr(strings.TrimPrefix(key, store.OwnerPrefix))
	if _, owned := m.cache.Get(key); err == nil && !owned {
		m.left[ip] = true
	}
}

// remains returns the changes that take away what owners left of IPs that are allocated no more.
func (m *mirror) remains(c control) (out []unit) {
	for ip := range m.left {
		key := store.AllocationKey(ip)
		if _, allocated := m.cache.Get(key); !allocated && c.values[key] == nil {
			out = append(out, append(unit{{Key: key, Absent: true}}, remainsOf(ip)...))
		}
	}
	return out
}

// sweepPage is how many keys are read at once.
const sweepPage = 1000

// sweep takes away what is left from before this leadership: of IPs and nodes that went while nobody led, or past a crdsync that knew nothing
// of this. It is for after the first pass, which has written all allocations and nodes. Each delete requires that etcd has no record of the IP or
// node; what the cache shows only spares the question.
func sweep(ctx context.Context, c *store.Client, lead *store.Leadership, cache *store.Cache, now control) error {
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
		err := c.EachKey(ctx, prefix, sweepPage, func(key string) error {
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
			return ask(store.AllocationKey(ip), remainsOf(ip))
		})
		if last = ""; err != nil {
			return err
		}
	}
	return nil
}

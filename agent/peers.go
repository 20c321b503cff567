package agent

import (
	"context"
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
)

// others are the addresses of the other agents of a snapshot.
type others struct {
	agents    map[string]egress.Agent // of the snapshot
	addresses map[string]netip.Addr
}

// updatePeers gives the gossip the other agents, and returns who is dead by it.
func (a *agent) updatePeers(r round) (dead func(node string) bool) {
	if a.gossip == nil {
		return func(string) bool { return false }
	}
	if a.others.addresses == nil || !plan.Same(r.Agents, a.others.agents) {
		a.others = others{r.Agents, make(map[string]netip.Addr, len(r.Agents))}
		for name, record := range r.Agents {
			if name != a.Node {
				a.others.addresses[name] = record.Address
			}
		}
	}
	gone := a.gossip.Dead()
	// In another order each time.
	a.gossip.Set(r.facts.Underlay, a.others.addresses, func(yield func(string, netip.Addr) bool) {
		for name, n := range r.Nodes {
			if len(n.Addresses) > 0 && !yield(name, n.Addresses[0]) {
				return
			}
		}
	}, r.lease.ID())
	addresses := a.others.addresses
	return func(node string) bool {
		_, known := addresses[node]
		return known && gone[node]
	}
}

// receive takes in a peer's message.
func (a *agent) receive(from string, b []byte) {
	var m ownership.Message
	if json.Unmarshal(b, &m) == nil { // else it is of a version to come
		_ = a.step(ownership.Heard{From: from, Message: m}) // withdraws nothing
	}
}

// askPromises asks the peers for promises while etcd is missing, until ctx ends. It begins when etcd is asked for a
// yes, looks again when the last yes is old enough to be missed, and every tenth of P from then on.
func (a *agent) askPromises(ctx context.Context) error {
	for {
		var next <-chan time.Time
		if now := time.Now(); a.machine.Asks(now) {
			due := a.Permit/4 - now.Sub(a.machine.Lease().Confirmed)
			if s := a.view.Snapshot(); due <= 0 && s != nil {
				_ = a.step(ownership.Question{Peers: a.peers(s)}) // withdraws nothing
			}
			next = time.After(max(due, a.Permit/10))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-a.promises:
		case <-next:
		}
	}
}

// peers returns the other agents that could claim: those that etcd knows, and those that joined while it does not
// answer.
func (a *agent) peers(s *egress.Snapshot) []string {
	all := map[string]bool{}
	for name := range s.Agents {
		all[name] = true
	}
	for _, name := range a.gossip.Alive() {
		all[name] = true
	}
	delete(all, a.Node)
	return slices.Sorted(maps.Keys(all))
}

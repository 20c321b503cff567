package plan

import (
	"cmp"
	"slices"

	"github.com/egret-project/egret/egress"
)

// Revocation is an agent whose lease is to be revoked.
type Revocation struct {
	Agent egress.Agent
	// Gone: the node's record is gone, whether the agent is dead or not. Alive: the gossip does not report the agent
	// dead, so it may be about to give its IPs back by itself.
	Gone, Alive bool
	// Rank is 0 for the node that revokes at once; each next one waits a step longer.
	Rank int
}

// Living returns the agents that are not dead by the gossip; nil where less than half of all, itself included, are
// alive by its gossip: it may be the one that is partitioned. Agents whose nodes are gone are not counted, alive or
// dead: an autoscaler may take most of them away at once. What it returns is not to be changed.
func Living(s *egress.Snapshot, node string, dead func(node string) bool) map[string]egress.Agent {
	absent := 0
	for name := range s.Agents {
		if Gone(s, name) || name != node && dead(name) {
			absent++
		}
	}
	if absent == 0 && len(s.Agents) > 0 {
		return s.Agents // as nearly always
	}
	out, all := map[string]egress.Agent{}, 0
	for name, a := range s.Agents {
		if Gone(s, name) {
			continue
		}
		if all++; name == node || !dead(name) {
			out[name] = a
		}
	}
	if 2*len(out) < all || all == 0 {
		return nil
	}
	return out
}

// rankFor returns how many of the able come before the node in revoking the lease of the agent name. The order differs
// for each agent, so that a node that cannot revoke delays only some.
func rankFor(name, node string, able map[string]egress.Agent) (rank int) {
	weight := weights(name)
	own := weight(node)
	for n := range able {
		if n == name || n == node {
			continue
		}
		if w := weight(n); w > own || w == own && n < node {
			rank++
		}
	}
	return rank
}

// Revocations returns the agents whose leases the node is to revoke, by name: those that are dead by the gossip, or
// whose node is gone, that hold egress IPs, and bound their permits. living are those of Living. Who is dead by the
// gossip is first suspected, so only agents that end suspicions are among them.
func Revocations(s *egress.Snapshot, node string, living map[string]egress.Agent, dead func(node string) bool) []Revocation {
	if _, ok := s.Agents[node]; !ok || Gone(s, node) || len(living) == len(s.Agents) {
		return nil
	}
	holds := map[string]bool{}
	for _, o := range s.Owners {
		holds[o.Node] = true
	}
	var out []Revocation
	var able map[string]egress.Agent // none is looked for while nothing is to be revoked
	for name, a := range s.Agents {
		gone := Gone(s, name)
		if name == node || !gone && (!dead(name) || !a.Suspectable) || !holds[name] || !a.Revocable || a.Restarting {
			continue
		}
		if able == nil {
			able = revokers(s, living)
		}
		out = append(out, Revocation{Agent: a, Gone: gone, Alive: !dead(name), Rank: rankFor(name, node, able)})
	}
	slices.SortFunc(out, func(a, b Revocation) int { return cmp.Compare(a.Agent.Node, b.Agent.Node) })
	return out
}

// revokers returns the agents among which those that revoke are ranked: those that pools select, since others may not
// see who holds what. living is nil where it is not known what the others' gossip says.
func revokers(s *egress.Snapshot, living map[string]egress.Agent) map[string]egress.Agent {
	if living == nil {
		living = s.Agents
	}
	out := map[string]egress.Agent{}
	for name, a := range living {
		if Gateway(s, name) {
			out[name] = a
		}
	}
	return out
}

package plan

import (
	"cmp"
	"maps"
	"slices"

	"github.com/egret-project/egret/egress"
)

// Revocation is an agent whose lease is to be revoked.
type Revocation struct {
	Agent egress.Agent
	// Alive says that only the node's record is gone: the agent may be about to let go by itself.
	Alive bool
	// Rank is 0 for the node that revokes at once; each next one waits a step longer.
	Rank int
}

// Living returns the agents that are not dead by the gossip. There are none while the node does not see most of them alive, itself
// included: it may be the one that is cut off. Of two halves the one with the first name counts as most. Agents whose nodes are gone are not
// counted, alive or dead: an autoscaler may take most of them away at once. What it returns is not to be changed.
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
	out := map[string]egress.Agent{}
	first, all := node, 0
	for name, a := range s.Agents {
		if Gone(s, name) {
			continue
		}
		all++
		if first = min(first, name); name == node || !dead(name) {
			out[name] = a
		}
	}
	_, half := out[first]
	if n := 2 * len(out); n < all || n == all && !half {
		return nil
	}
	return out
}

// Revocations returns the agents whose leases the node is to revoke, by name: those that are dead by the gossip, or whose node is gone,
// that hold egress IPs, and bound their permits. living are those of Living: without any there are none.
func Revocations(s *egress.Snapshot, node string, living map[string]egress.Agent, dead func(node string) bool) []Revocation {
	if _, ok := living[node]; !ok || len(living) == len(s.Agents) {
		return nil
	}
	holds := map[string]bool{}
	for _, o := range s.Owners {
		holds[o.Node] = true
	}
	var out []Revocation
	for name, a := range s.Agents {
		if _, ok := living[name]; ok || !holds[name] || !a.Revocable || a.Restarting {
			continue
		}
		// Ranked anew for each of them, so that one that cannot do it does not hold up all.
		ranked := slices.SortedFunc(maps.Keys(living), func(a, b string) int {
			return cmp.Or(cmp.Compare(weightOf(name, b), weightOf(name, a)), cmp.Compare(a, b))
		})
		out = append(out, Revocation{Agent: a, Alive: !dead(name), Rank: slices.Index(ranked, node)})
	}
	slices.SortFunc(out, func(a, b Revocation) int { return cmp.Compare(a.Agent.Node, b.Agent.Node) })
	return out
}

// Missed returns the nodes that died by the gossip while the node itself may have been cut off, and have not been seen since: missed
// are those so far. Their deaths say nothing. When the gossip comes back it finds them one by one, and the first ones found may make
// most before the others are. alone says that Living knows none.
func Missed(s *egress.Snapshot, node string, alone bool, dead func(node string) bool, missed map[string]bool) map[string]bool {
	out := map[string]bool{}
	for name := range s.Agents {
		if name != node && dead(name) && (alone || missed[name]) {
			out[name] = true
		}
	}
	return out
}

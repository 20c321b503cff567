package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
)

// maxNamed is how many nodes Unowned names for each reason.
const maxNamed = 3

// Unowned says why no node holds an address, as far as the snapshot tells: first of all the host outside the cluster
// that uses it, by the first node that reports one. owned is Cluster.Owned, or a function that returns the same; it is
// asked of nodes that have a limit.
func Unowned(s *egress.Snapshot, a egress.Address, owned func(node string) int) string {
	for _, node := range slices.Sorted(maps.Keys(s.Agents)) {
		if who := s.Agents[node].Conflicts[a.IP]; who != "" {
			return fmt.Sprintf("no node holds %s: another host uses it, %s of node %s", a.IP, who, node)
		}
	}
	if a.Pool == "" {
		return fmt.Sprintf("no node with a live agent has %s on an interface", a.IP)
	}
	pool, ok := s.Pools[a.Pool]
	if !ok {
		return fmt.Sprintf("no node holds %s: pool %s does not exist", a.IP, a.Pool)
	}
	selected, could := 0, 0
	var refused, dead, restarting, cordoned, full []string
	for name, node := range s.Nodes {
		if !selects(s, pool, name) {
			continue
		}
		selected++
		agent, running := s.Agents[name]
		switch why := agent.Refused[a.Pool]; {
		case why != "":
			refused = append(refused, name+": "+why)
		case !running:
			dead = append(dead, name)
		case Cordoned(s, name):
			cordoned = append(cordoned, name)
		case agent.Restarting:
			restarting = append(restarting, name)
		case node.Capacity != 0 && owned(name) >= node.Capacity:
			full = append(full, name)
		default:
			could++
		}
	}
	switch {
	case selected == 0:
		return fmt.Sprintf("no node holds %s: pool %s selects no node", a.IP, a.Pool)
	case could > 0:
		return fmt.Sprintf("no node holds %s yet: %s could", a.IP, count(could))
	}
	why := fmt.Sprintf("no node holds %s: pool %s selects %s", a.IP, a.Pool, count(selected))
	for _, state := range []struct {
		what  string
		nodes []string
	}{
		{"refused by ", refused}, {"without a live agent: ", dead}, {"cordoned: ", cordoned}, {"with an agent that restarts: ", restarting},
		{"without room, see egret get nodes: ", full},
	} {
		slices.Sort(state.nodes)
		if n := len(state.nodes) - maxNamed; n > 0 {
			state.nodes = append(state.nodes[:maxNamed], fmt.Sprintf("and %d more", n))
		}
		if len(state.nodes) > 0 {
			why += "; " + state.what + strings.Join(state.nodes, ", ")
		}
	}
	return why
}

func count(nodes int) string {
	if nodes == 1 {
		return "1 node"
	}
	return fmt.Sprintf("%d nodes", nodes)
}

package plan

import (
	"maps"

	"github.com/egret-project/egret/egress"
)

// Bystander reports whether the node holds no egress IP and can get none: no pool selects it, it has no static egress
// IP on a link, and no planned move is about to bring it one. Such a node decides nothing about locks, so it need not
// see those of all egress IPs. Where a record that would tell cannot be read, it is none. Owners that are not in the
// snapshot are not the node's, if it was a Bystander when they last were.
func (c *Cluster) Bystander(f Facts) bool {
	s := c.Snapshot
	if _, known := s.Nodes[f.Node]; !known || faulty(s, "pools/") || faulty(s, "nodes/") || faulty(s, "egresses/") || faulty(s, "owners/") {
		return false
	}
	if Gateway(s, f.Node) {
		return false
	}
	for _, t := range c.targets {
		if t.Pool == "" && f.Local[t.IP] {
			return false
		}
	}
	if len(c.Held(f.Node)) > 0 {
		return false
	}
	for _, m := range s.Moves {
		if m.To == f.Node {
			return false
		}
	}
	return true
}

// Gateway reports whether some pool selects the node.
func Gateway(s *egress.Snapshot, node string) bool {
	for p := range maps.Values(s.Pools) {
		if selects(s, p, node) {
			return true
		}
	}
	return false
}

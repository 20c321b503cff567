package plan

import (
	"net/netip"
	"slices"

	"github.com/egret-project/egret/egress"
)

// Arrivals returns the planned moves toward the node of IPs that another node holds: the node prepares itself and says so. By IP.
func Arrivals(s *egress.Snapshot, f Facts) []egress.Move {
	var out []egress.Move
	for ip, m := range s.Moves {
		o, owned := s.Owners[ip]
		if m.To != f.Node || !owned || o.Node == f.Node || !f.serves(ip) {
			continue
		}
		if slices.Contains(Candidates(s, poolOf(s, ip)), f.Node) {
			out = append(out, m)
		}
	}
	slices.SortFunc(out, func(a, b egress.Move) int { return a.IP.Compare(b.IP) })
	return out
}

// Departure is a planned move whose target is ready: the owner stops answering for the IP and hands it over.
type Departure struct {
	Owner egress.Owner
	Move  egress.Move
	To    egress.Agent
}

// Departures returns the planned moves, ready at their target, of IPs that the node holds. By IP.
func Departures(s *egress.Snapshot, f Facts) []Departure {
	var out []Departure
	for ip, m := range s.Moves {
		o, to := s.Owners[ip], s.Agents[m.To]
		if m.Ready && o.Node == f.Node && m.To != f.Node && slices.Contains(Candidates(s, poolOf(s, ip)), m.To) {
			out = append(out, Departure{Owner: o, Move: m, To: to})
		}
	}
	slices.SortFunc(out, func(a, b Departure) int { return a.Owner.IP.Compare(b.Owner.IP) })
	return out
}

func poolOf(s *egress.Snapshot, ip netip.Addr) string {
	for _, p := range s.Egresses {
		for _, a := range p.Addresses {
			if a.IP == ip {
				return a.Pool
			}
		}
	}
	return ""
}

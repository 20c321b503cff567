package plan

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
)

// Unread is what is not known of the selected pods of a node, since records could not be read since the agent began.
type Unread struct {
	// Pods are those of egresses whose own record could not be read.
	Pods map[netip.Addr]bool
	// Members: of some egress it could not be read which pods it selects. Any pod may be its, but for those with an id
	// of Known.
	Members bool
	Known   map[egress.ID]bool
}

// unread returns what is not known of the selected pods of a node; nil: all of them are known.
func unread(s *egress.Snapshot, node string) *Unread {
	below := "members/by-node/" + node + "/"
	u := &Unread{Pods: map[netip.Addr]bool{}, Known: map[egress.ID]bool{}}
	for name, members := range s.ByNode {
		if _, ok := s.Egresses[name]; ok || name == egress.Unselected || !blind(s, "egresses/"+name) {
			continue
		}
		for _, pod := range members.Pods {
			for _, ip := range pod.IPs {
				u.Pods[ip] = true
			}
		}
	}
	of := map[string]bool{} // the egresses whose members could not be read
	for _, f := range s.Faults {
		if name, ok := strings.CutPrefix(f.Key, below); ok && f.Blind && name != egress.Unselected {
			of[name] = true
		}
	}
	if len(of) == 0 {
		if len(u.Pods) == 0 {
			return nil
		}
		return u
	}
	u.Members = true
	for name := range of {
		if _, ok := s.Egresses[name]; !ok {
			return u // it may have any id
		}
	}
	for name, p := range s.Egresses {
		for _, a := range p.Addresses {
			known, seen := u.Known[a.ID] // egresses may share a static IP
			u.Known[a.ID] = (known || !seen) && !of[name]
		}
	}
	return u
}

// Keeping returns what was planned, for a kernel whose tables have the pods of have: where not all is known, it depends
// on these which pods are added and which stay.
func (d Desired) Keeping(have map[netip.Addr]egress.ID) Desired {
	if d.Unknown != nil || d.Unread != nil {
		d.NFT.Pods = d.pods(have)
	}
	return d
}

// pods returns the pods that the kernel gets, with the ids of their egress IPs, where it has those of have. What a pod sends
// that it does not have, of an egress that could not be read, is dropped: nobody knows its egress IP.
func (d Desired) pods(have map[netip.Addr]egress.ID) map[netip.Addr]egress.ID {
	out := map[netip.Addr]egress.ID{}
	for ip, id := range d.NFT.Pods {
		if _, there := have[ip]; there || d.Unknown == nil {
			out[ip] = id
		}
	}
	for ip, id := range have {
		if _, wanted := d.NFT.Pods[ip]; !wanted && d.Unread.may(ip, id) && !slices.Contains(d.NFT.Unselected, ip) {
			out[ip] = id
		}
	}
	if d.Unread == nil || d.Unknown != nil {
		return out
	}
	for ip := range d.Unread.Pods {
		if _, there := out[ip]; !there && !slices.Contains(d.NFT.Unselected, ip) {
			out[ip] = 0
		}
	}
	return out
}

// may reports whether a pod that the kernel has with an id may be selected.
func (u *Unread) may(ip netip.Addr, id egress.ID) bool {
	return u != nil && (u.Pods[ip] || u.Members && !u.Known[id])
}

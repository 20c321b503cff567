package check

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// found makes a finding that is as it should be when wrong is empty.
func found(check, use, what, wrong string) Finding {
	f := Finding{Check: check, Level: OK, Found: what, For: use, Consequence: wrong}
	if wrong != "" {
		f.Level = Warning
	}
	return f
}

// settings are the sysctls that matter, with the value that does no harm; "": any, it is named for who looks for what
// drops his packets.
var settings = []struct{ key, want, use, consequence string }{
	{"net/ipv4/ip_forward", "1", "gateways", "a gateway drops other nodes' IPv4 egress traffic: sysctl -w net.ipv4.ip_forward=1"},
	{"net/netfilter/nf_conntrack_tcp_loose", "1", "open TCP connections", "they break when their egress IP moves, and when a pod becomes selected, since conntrack takes no connection up in the middle: " +
		"sysctl -w net.netfilter.nf_conntrack_tcp_loose=1"},
	{"net/ipv4/fwmark_reflect", "0", "gateways", "what a gateway answers about a packet of another node's pod, as that it is too large, goes where that was going and not to the pod: " +
		"sysctl -w net.ipv4.fwmark_reflect=0"},
	{"net/ipv6/fwmark_reflect", "0", "gateways", "what a gateway answers about a packet of another node's pod, as that it is too large, goes where that was going and not to the pod: " +
		"sysctl -w net.ipv6.fwmark_reflect=0"},
	{"net/ipv4/conf/all/src_valid_mark", "", "strict rp_filter on pods' links", ""},
	{"net/netfilter/nf_conntrack_acct", "", "bytes in the log of connections (agent --nat-log): of those that begin while it is 1", ""},
	{"net/netfilter/nf_conntrack_timestamp", "", "the kernel's times there: of connections that begin while it is 1", ""},
	{"net/ipv6/conf/all/forwarding", "1", "gateways", "a gateway drops other nodes' IPv6 egress traffic: sysctl -w net.ipv6.conf.all.forwarding=1"},
}

func sysctls() []Finding {
	var out []Finding
	for _, s := range settings {
		b, err := os.ReadFile("/proc/sys/" + s.key)
		value, wrong := strings.TrimSpace(string(b)), ""
		if err != nil {
			value = "not there"
		}
		// without conntrack's, there is none yet
		if s.want != "" && value != s.want && (err == nil || s.want == "1" && !strings.Contains(s.key, "netfilter")) {
			wrong = s.consequence
		}
		out = append(out, found(strings.ReplaceAll(s.key, "/", "."), s.use, value, wrong))
	}
	return out
}

// collisions looks for others that use what is reserved for Egret.
func collisions() []Finding {
	chains, err := chainsOfOthers()
	ofMarks := func() ([]string, error) {
		if err != nil {
			return nil, err
		}
		return marksOfOthers(chains)
	}
	ofConnMarks := func() ([]string, error) { return connMarksOfOthers(chains), err }
	return []Finding{
		foreign("rule-priorities", fmt.Sprintf("%d-%d", egress.MinPriority, egress.MaxPriority), "steering packets",
			"packets may take a way that is not Egret's: give these rules other priorities", rulesAt),
		foreign("packet-mark", fmt.Sprintf("mask 0x%x, before the route lookup 0x%x, of rules 0x%x", uint32(egress.MarkMask), uint32(egress.RuleMask), uint32(egress.RuleMask|egress.Mark(egress.MaxID))), "steering packets",
			"egress traffic and theirs may be taken for each other: move their marks out of this mask", ofMarks),
		foreign("conn-mark", fmt.Sprintf("0x%x/0x%x", uint32(egress.ConnTag), uint32(egress.ConnTagMask)), "knowing egress connections",
			"where they mark a connection of a selected pod, it is dropped or leaves with another source: keep them off those", ofConnMarks),
		foreign("route-tables", fmt.Sprintf("%d-%d", egress.FirstTable, egress.LocalMark.Table()), "steering packets",
			"egress packets may take these routes: move them to another table", routesOfOthers),
		forwarding(dropsForwarded(chains), err),
		foreign("overlay-port", fmt.Sprintf("UDP %d", egress.OverlayPort), "the overlay between nodes",
			"no egress traffic passes between nodes: stop who uses the port", portInUse),
	}
}

// forwarding makes a finding of who drops forwarded packets that he does not know.
func forwarding(droppers []string, err error) Finding {
	const name, use = "forward-policy", "egress traffic, which every node forwards"
	switch {
	case err != nil:
		return found(name, use, fmt.Sprintf("unknown: %v", err), "it is not known whether egress traffic is forwarded")
	case len(droppers) > 0:
		return found(name, use, "drop: "+strings.Join(droppers, "; "),
			"egress traffic is dropped unless they accept it: have them accept what comes in and what goes out by the link egret.vx")
	}
	return found(name, use, "accept", "")
}

// foreign makes a finding of what others have in a reserved place.
func foreign(check, place, use, consequence string, look func() ([]string, error)) Finding {
	others, err := look()
	switch {
	case err != nil:
		return found(check, use, fmt.Sprintf("unknown: %v", err), "it is not known whether others use "+place)
	case len(others) > 0:
		slices.Sort(others)
		return found(check, use, "also used by "+strings.Join(slices.Compact(others), "; "), consequence)
	}
	return found(check, use, place+" free", "")
}

// rules returns the ip rules of others.
func rules() ([]netlink.Rule, error) {
	var out []netlink.Rule
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		all, err := netlink.RuleList(family)
		if err != nil && family == unix.AF_INET { // IPv6 may be off
			return nil, fmt.Errorf("listing rules: %w", err)
		}
		for _, r := range all {
			if r.Protocol != egress.RouteProtocol {
				out = append(out, r)
			}
		}
	}
	return out, nil
}

func rulesAt() (out []string, err error) {
	all, err := rules()
	for _, r := range all {
		if r.Priority >= egress.MinPriority && r.Priority <= egress.MaxPriority {
			out = append(out, fmt.Sprintf("rule %d", r.Priority))
		}
	}
	return out, err
}

func routesOfOthers() (out []string, err error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		all, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil && family == unix.AF_INET {
			return nil, fmt.Errorf("listing routes: %w", err)
		}
		for _, r := range all {
			if r.Table >= egress.FirstTable && r.Table <= egress.LocalMark.Table() && r.Protocol != egress.RouteProtocol {
				out = append(out, fmt.Sprintf("a route to %v in table %d", r.Dst, r.Table))
			}
		}
	}
	return out, nil
}

// portInUse tries the port, unless the overlay link itself has it.
func portInUse() ([]string, error) {
	if _, err := netlink.LinkByName(egress.OverlayLink); err == nil {
		return nil, nil
	}
	c, err := net.ListenPacket("udp", fmt.Sprintf(":%d", egress.OverlayPort))
	if errors.Is(err, unix.EADDRINUSE) {
		return []string{"another program"}, nil
	} else if err != nil {
		return nil, err
	}
	return nil, c.Close()
}

// uplink says which link carries nodeIP, or else the default route, and what the overlay makes of its MTU.
func uplink(nodeIP netip.Addr) Finding {
	const name, use = "uplink", "the overlay, and announcing egress IPs"
	l, err := uplinkOf(nodeIP)
	if err != nil {
		return found(name, use, fmt.Sprintf("none: %v", err), "the agent finds no link to work on: set --node-ip to an address of this node")
	}
	overhead := 50
	if nodeIP.Is6() {
		overhead = 70
	}
	a := l.Attrs()
	wrong := ""
	if a.MTU-overhead < 1280 {
		wrong = "IPv6 wants an MTU of 1280 at least, and the overlay is left with less"
	}
	return found(name, use, fmt.Sprintf("%s, MTU %d, overlay MTU %d", a.Name, a.MTU, a.MTU-overhead), wrong)
}

func uplinkOf(nodeIP netip.Addr) (netlink.Link, error) {
	if !nodeIP.IsValid() {
		all, err := netlink.RouteList(nil, unix.AF_INET)
		if err != nil {
			return nil, fmt.Errorf("listing routes: %w", err)
		}
		i := slices.IndexFunc(all, func(r netlink.Route) bool { return (r.Dst == nil || r.Dst.IP.IsUnspecified()) && r.LinkIndex > 0 })
		if i < 0 {
			return nil, errors.New("there is no default route")
		}
		return netlink.LinkByIndex(all[i].LinkIndex)
	}
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("listing addresses: %w", err)
	}
	// The overlay link carries the node's address, too.
	overlay, _ := net.InterfaceByName(egress.OverlayLink)
	for _, a := range all {
		if a.IP.Equal(nodeIP.AsSlice()) && (overlay == nil || a.LinkIndex != overlay.Index) {
			return netlink.LinkByIndex(a.LinkIndex)
		}
	}
	return nil, fmt.Errorf("no link carries %s", nodeIP)
}

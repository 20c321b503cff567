package check

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// beside looks for what other programs do to packets of egresses.
func beside() []Finding {
	return []Finding{
		inTheWay("nat-chains", "the egress IP as source", "none comes before Egret's",
			"egress traffic that they translate first is dropped: give these chains a priority above "+fmt.Sprint(egress.TranslatePriority), NATAhead),
		inTheWay("dnat-chains", "no service at egress IPs", "none comes before Egret's",
			"where they translate what comes for an egress IP, it offers that service, as a NodePort: give these chains a priority above "+fmt.Sprint(egress.TranslatePriority), dnatAhead),
		inTheWay("flowtables", "moves, and being silent about egress IPs of other nodes", "none",
			"egress connections that one takes over leave as they first did, after a move and without a permit, too: "+
				"keep them out of it, as by `ct mark & 0xffff0000 != 0x0e9e0000` before `flow add`, or take it away", flowtables),
		inTheWay("rules-ahead", "steering to gateways", fmt.Sprintf("none of others below %d", egress.MinPriority),
			fmt.Sprintf("egress traffic that they match goes their way, and is dropped: give them a priority above %d (without one, ip(8) puts a rule first)",
				egress.MaxPriority), RulesAhead),
	}
}

// inTheWay makes a finding of who does something to packets of egresses; none is what to say when nobody does.
func inTheWay(check, use, none, consequence string, look func() ([]string, error)) Finding {
	others, err := look()
	switch {
	case err != nil:
		return found(check, use, fmt.Sprintf("unknown: %v", err), "it is not known whether others are in the way")
	case len(others) > 0:
		const most = 5
		if more := len(others) - most; more > 0 {
			others = append(others[:most:most], fmt.Sprintf("and %d more", more))
		}
		return found(check, use, strings.Join(others, "; "), consequence)
	}
	return found(check, use, none, "")
}

// NATAhead names the nftables chains of others that translate sources before Egret does, or, at its priority, may do.
func NATAhead() ([]string, error) { return natAhead(*nftables.ChainHookPostrouting) }

// dnatAhead names those that translate destinations before Egret's address guard.
func dnatAhead() ([]string, error) {
	return natAhead(*nftables.ChainHookPrerouting, *nftables.ChainHookOutput)
}

// natAhead names those at any of the hooks. Egret has all of its NAT at one priority, the first that there is.
func natAhead(hooks ...nftables.ChainHook) (out []string, err error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("listing chains: %w", err)
	}
	for _, ch := range chains {
		if !ours(ch.Table) && ch.Type == nftables.ChainTypeNAT && ch.Hooknum != nil && slices.Contains(hooks, *ch.Hooknum) &&
			ch.Priority != nil && *ch.Priority <= egress.TranslatePriority {
			out = append(out, fmt.Sprintf("chain %s at priority %d", nameOf(ch), *ch.Priority))
		}
	}
	slices.Sort(out)
	return out, nil
}

// flowtables names the flowtables of others: the packets of a connection that is in one pass no chain but ingress.
func flowtables() (out []string, err error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil, fmt.Errorf("listing tables: %w", err)
	}
	for _, t := range tables {
		if ours(t) {
			continue // that of a trace may go meanwhile
		}
		all, err := c.ListFlowtables(t)
		if err != nil {
			if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
				return nil, nil // a kernel without
			}
			return nil, fmt.Errorf("listing the flowtables of table %s: %w", t.Name, err)
		}
		for _, f := range all {
			out = append(out, "flowtable "+nameOf(&nftables.Chain{Table: t, Name: f.Name}))
		}
	}
	slices.Sort(out)
	return out, nil
}

// RulesAhead names the ip rules of others that come before Egret's and may match what it steers: that has the routing
// bit and no bit beside Egret's in its mark. The rule of the table local comes first everywhere, and matches no egress
// traffic.
func RulesAhead() (out []string, err error) {
	all, err := rules()
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		if r.Priority >= egress.MinPriority || r.Table == unix.RT_TABLE_LOCAL || !matchesOurs(r) {
			continue
		}
		words := fmt.Sprintf("ip rule %d", max(r.Priority, 0))
		if r.Table > 0 {
			words += fmt.Sprintf(" lookup %d", r.Table)
		}
		if r.Family == unix.AF_INET6 {
			words = strings.Replace(words, "ip", "ip -6", 1)
		}
		out = append(out, words)
	}
	return out, nil
}

// matchesOurs reports whether the mark of a rule may be one of Egret's routing marks, and the rule is for packets that
// come in.
func matchesOurs(r netlink.Rule) bool {
	if r.IifName == "lo" || r.OifName != "" {
		return false
	}
	mask := uint32(0xffffffff)
	if r.Mask != nil {
		mask = *r.Mask
	}
	if r.Mark == 0 && r.Mask == nil {
		return true
	}
	foreign := r.Mark&^uint32(egress.MarkMask) != 0 || mask&uint32(egress.RoutingBit) != 0 && r.Mark&uint32(egress.RoutingBit) == 0
	return foreign == r.Invert
}

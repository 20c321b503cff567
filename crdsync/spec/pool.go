package spec

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
)

// maxFaults bounds how many faults of one kind an error names: of a thousand ranges, all may be wrong.
const maxFaults = 10

// maxRanges is how many ranges a pool may have, by its CRD. The webhook is asked about what no API server has looked at,
// too, and each range is compared with all others.
const maxRanges = 1000

// join joins the first of the errors.
func join(errs []error) error {
	if len(errs) > maxFaults {
		errs = append(errs[:maxFaults:maxFaults], errors.New("and more"))
	}
	return errors.Join(errs...)
}

// conflict is what is wrong with an object beside others.
type conflict struct {
	error        // names what the others have
	brief string // in words of the object alone
}

// Brief is the text of an error of this package without what other objects have: neither their ranges, nor their
// addresses, nor their names that the object does not have itself. Faults that are alike without them are one.
func Brief(err error) string {
	var faults []string
	add := func(text string) {
		if !slices.Contains(faults, text) {
			faults = append(faults, text)
		}
	}
	var c conflict
	switch joined, ok := err.(interface{ Unwrap() []error }); {
	case ok:
		for _, err := range joined.Unwrap() {
			add(Brief(err))
		}
	case errors.As(err, &c):
		add(c.brief)
	default:
		add(err.Error())
	}
	return strings.Join(faults, "\n")
}

// Pool reads an ExternalIPPool. The error names everything that is wrong with it by itself.
func Pool(name string, s v1beta1.ExternalIPPoolSpec) (egress.Pool, error) {
	p := egress.Pool{Name: name, Ranges: []egress.Range{}}
	if n := len(s.IPRanges); n > maxRanges {
		return p, fmt.Errorf("ipRanges has %d ranges: want %d at most", n, maxRanges)
	}
	var errs []error
	for i, r := range s.IPRanges {
		got, ok, err := readRange(r)
		if err != nil {
			errs = append(errs, fmt.Errorf("ipRanges[%d]: %w", i, err))
		} else if ok {
			p.Ranges = append(p.Ranges, got)
		}
	}
	subnet, faults := readSubnet(s.SubnetInfo)
	p.Subnet = subnet
	for _, err := range faults {
		errs = append(errs, fmt.Errorf("subnetInfo: %w", err))
	}
	if _, err := selector("nodeSelector", &s.NodeSelector); err != nil {
		errs = append(errs, err)
	}
	nodes := s.NodeSelector.Kubernetes()
	p.NodeSelector.MatchLabels = nodes.MatchLabels
	for _, m := range nodes.MatchExpressions {
		p.NodeSelector.MatchExpressions = append(p.NodeSelector.MatchExpressions, egress.Requirement{
			Key: m.Key, Operator: string(m.Operator), Values: m.Values,
		})
	}
	return p, errors.Join(join(errs), within(p))
}

// readRange reads one range; ok is false when it has no address.
func readRange(r v1beta1.IPRange) (got egress.Range, ok bool, err error) {
	switch {
	case r.CIDR != "" && (r.Start != "" || r.End != ""):
		return got, false, fmt.Errorf("cidr %q, start %q and end %q: want a cidr, or a start and an end, not both", r.CIDR, r.Start, r.End)
	case r.CIDR != "":
		got, ok, err = egress.ParseCIDR(r.CIDR)
		if ok && !(got.Start.IsGlobalUnicast() && got.End.IsGlobalUnicast()) {
			err = fmt.Errorf("cidr %s: want unicast addresses, neither loopback nor link-local", r.CIDR)
		}
	case r.Start == "" && r.End == "":
		err = errors.New("neither cidr nor start and end: want a cidr, or a start and an end")
	case r.End == "":
		err = fmt.Errorf("start %q without an end: want a cidr, or a start and an end", r.Start)
	case r.Start == "":
		err = fmt.Errorf("end %q without a start: want a cidr, or a start and an end", r.End)
	default:
		if got, err = egress.ParseRange(string(r.Start), string(r.End)); err == nil {
			ok, err = true, cmp.Or(unicast("start", r.Start, got.Start), unicast("end", r.End, got.End))
		}
	}
	return got, ok && err == nil, err
}

func readSubnet(s *v1beta1.SubnetInfo) (*egress.Subnet, []error) {
	if s == nil {
		return nil, nil
	}
	var errs []error
	gateway, err := address("gateway", s.Gateway)
	if err != nil {
		errs = append(errs, err)
	} else if limit := gateway.BitLen() - 1; s.PrefixLength < 1 || int(s.PrefixLength) > limit {
		errs = append(errs, fmt.Errorf("prefixLength %d: want 1 to %d, as the gateway is %s", s.PrefixLength, limit, s.Gateway))
	}
	if s.VLAN < 0 || s.VLAN > 4094 {
		errs = append(errs, fmt.Errorf("vlan %d: want 1 to 4094, or 0 for none", s.VLAN))
	}
	if len(errs) > 0 {
		return nil, errs
	}
	return &egress.Subnet{Gateway: gateway, PrefixLength: int(s.PrefixLength), VLAN: int(s.VLAN)}, nil
}

// within names the ranges that overlap with one before them, and those that leave the subnet.
func within(p egress.Pool) error {
	var errs []error
	for i, r := range p.Ranges {
		for _, o := range p.Ranges[:i] {
			if overlap(r, o) && len(errs) <= maxFaults {
				errs = append(errs, fmt.Errorf("ipRanges: %s overlaps with %s of the same pool: want each address once", r, o))
			}
		}
		if p.Subnet == nil {
			continue
		}
		gateway := p.Subnet.Gateway
		subnet := netip.PrefixFrom(gateway, p.Subnet.PrefixLength).Masked()
		switch {
		case gateway.Is4() != r.Start.Is4():
			errs = append(errs, fmt.Errorf("subnetInfo: gateway %s is not of the IP family of the range %s: want one family", gateway, r))
		case !subnet.Contains(r.Start) || !subnet.Contains(r.End):
			errs = append(errs, fmt.Errorf("ipRanges: %s is not inside of the pool's subnet: want addresses of %s", r, subnet))
		}
	}
	return join(errs)
}

func overlap(a, b egress.Range) bool { return a.Contains(b.Start) || b.Contains(a.Start) }

// Overlap names the ranges of a pool that overlap with those of other pools; the pool itself may be among these.
func Overlap(p egress.Pool, others map[string]egress.Pool) error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(others)) {
		other := others[name]
		if name == p.Name {
			continue
		}
		for _, r := range p.Ranges {
			for _, o := range other.Ranges {
				if overlap(r, o) && len(errs) <= maxFaults {
					errs = append(errs, conflict{
						fmt.Errorf("ipRanges: %s overlaps with %s of pool %s: want each address in one pool", r, o, other.Name),
						fmt.Sprintf("ipRanges: %s overlaps with another pool: want each address in one pool; `kubectl get externalippools -o yaml` has their ranges", r),
					})
				}
			}
		}
	}
	return join(errs)
}

// Added returns the pool with only those of its ranges that it did not have before.
func Added(from, to egress.Pool) egress.Pool {
	to.Ranges = slices.DeleteFunc(slices.Clone(to.Ranges), func(r egress.Range) bool { return slices.ContainsFunc(from.Ranges, r.Equal) })
	return to
}

// TakenAway names the addresses in use that a pool had and no longer has. How its ranges are written and ordered does
// not matter.
func TakenAway(from, to egress.Pool, inUse []egress.Allocation) error {
	var errs []error
	inUse = slices.SortedFunc(slices.Values(inUse), func(a, b egress.Allocation) int { return a.IP.Compare(b.IP) })
	for _, a := range inUse {
		if a.Pool != from.Name || !from.Contains(a.IP) || to.Contains(a.IP) {
			continue
		}
		if to.Subnet != nil && to.Subnet.Gateway == a.IP {
			const want = "want another gateway, or the egress moved to another pool first"
			errs = append(errs, conflict{
				fmt.Errorf("subnetInfo: gateway %s is in use by egress %s: %s", a.IP, strings.Join(a.Egresses, ", "), want),
				fmt.Sprintf("subnetInfo: gateway %s is in use: %s; `kubectl get egresses -o wide` has its egress", a.IP, want),
			})
			continue
		}
		where := ""
		for _, r := range from.Ranges {
			if r.Contains(a.IP) {
				where = r.String()
			}
		}
		want := fmt.Sprintf("want its range %s kept, or the egress moved to another pool first", where)
		errs = append(errs, conflict{
			fmt.Errorf("ipRanges: %s is in use by egress %s: %s", a.IP, strings.Join(a.Egresses, ", "), want),
			fmt.Sprintf("ipRanges: an address is in use: %s; `kubectl get egresses -o wide` has the addresses of egresses", want),
		})
	}
	return join(errs)
}

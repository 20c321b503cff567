package crdsync

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
)

// capacityAnnotation is the node's own limit of egress IPs, 0..maxCapacity, as the guide has it.
const (
	capacityAnnotation = "node.antrea.io/max-egress-ips"
	maxCapacity        = 255
)

// demand is what an Egress asks for, as far as its object can be read.
type demand struct {
	name       string
	created    time.Time
	generation int64
	ips        []netip.Addr // that the spec names, at most one of each family
	pools      []string     // that the spec names
	statusIP   netip.Addr   // the zero Addr: none
	bandwidth  *egress.Bandwidth
	applied    selector

	// What could not be read. What etcd holds in its place stands.
	addressErr, bandwidthErr, selectorErr error
}

// err returns all that could not be read.
func (d demand) err() error {
	// all three are the same one when it is the object as a whole
	return errors.Join(slices.Compact([]error{d.addressErr, d.selectorErr, d.bandwidthErr})...)
}

// readEgress reads an Egress. It always returns a demand with the object's name and age.
func readEgress(u *unstructured.Unstructured) demand {
	d := demand{name: u.GetName(), created: u.GetCreationTimestamp().UTC(), generation: u.GetGeneration()}
	var e v1beta1.Egress
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &e); err != nil {
		err = fmt.Errorf("reading the object: %w", err)
		d.addressErr, d.bandwidthErr, d.selectorErr = err, err, err
		return d
	}
	d.readAddresses(e.Spec)
	if ip, err := netip.ParseAddr(e.Status.EgressIP); err == nil { // a hint and nothing more
		d.statusIP = ip.Unmap()
	}
	d.bandwidth, d.bandwidthErr = readBandwidth(e.Spec.Bandwidth)
	d.applied, d.selectorErr = readAppliedTo(e.Spec.AppliedTo)
	return d
}

func (d *demand) readAddresses(s v1beta1.EgressSpec) {
	var errs []error
	seen := map[family]netip.Addr{}
	for _, text := range named(s.EgressIP, s.EgressIPs) {
		ip, err := netip.ParseAddr(text)
		if err != nil || ip.Zone() != "" {
			errs = append(errs, fmt.Errorf("egressIP %q: want an IPv4 or IPv6 address", text))
			continue
		}
		ip = ip.Unmap()
		if other, ok := seen[familyOf(ip)]; ok && other != ip {
			errs = append(errs, fmt.Errorf("egressIPs %s and %s: want at most one of each IP family", other, ip))
		} else if !ok {
			seen[familyOf(ip)] = ip
			d.ips = append(d.ips, ip)
		}
	}
	d.pools = named(s.ExternalIPPool, s.ExternalIPPools)
	if len(d.pools) == 0 && len(d.ips) == 0 && errs == nil {
		errs = append(errs, errors.New("neither egressIP nor externalIPPool is set: want one of them, or both"))
	}
	d.addressErr = errors.Join(errs...)
}

// named returns the values of a singular field and of its plural, each once, without empty ones.
func named(one string, more []string) []string {
	var out []string
	for _, s := range append([]string{one}, more...) {
		if s != "" && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

func readBandwidth(b *v1beta1.Bandwidth) (*egress.Bandwidth, error) {
	if b == nil {
		return nil, nil
	}
	rate, rateErr := readQuantity("rate", b.Rate)
	burst, burstErr := readQuantity("burst", b.Burst)
	if err := errors.Join(rateErr, burstErr); err != nil {
		return nil, err
	}
	return &egress.Bandwidth{Rate: rate, Burst: burst}, nil
}

func readQuantity(field, text string) (int64, error) {
	q, err := resource.ParseQuantity(text)
	if err != nil || q.Sign() <= 0 {
		return 0, fmt.Errorf("bandwidth %s %q: want a quantity above 0, like 300k, 100M or 2G", field, text)
	}
	return q.Value(), nil
}

// readPool reads an ExternalIPPool. An error names everything that is wrong with it.
func readPool(u *unstructured.Unstructured) (egress.Pool, error) {
	var e v1beta1.ExternalIPPool
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &e); err != nil {
		return egress.Pool{}, fmt.Errorf("reading the object: %w", err)
	}
	p := egress.Pool{Name: u.GetName(), Ranges: []egress.Range{}}
	var errs []error
	for _, r := range e.Spec.IPRanges {
		got, ok, err := readRange(r)
		if errs = append(errs, err); ok {
			p.Ranges = append(p.Ranges, got)
		}
	}
	var err error
	p.Subnet, err = readSubnet(e.Spec.SubnetInfo)
	errs = append(errs, err)
	if _, err := readSelector("nodeSelector", &e.Spec.NodeSelector); err != nil {
		errs = append(errs, err)
	}
	p.NodeSelector.MatchLabels = e.Spec.NodeSelector.MatchLabels
	for _, m := range e.Spec.NodeSelector.MatchExpressions {
		p.NodeSelector.MatchExpressions = append(p.NodeSelector.MatchExpressions, egress.Requirement{
			Key: m.Key, Operator: string(m.Operator), Values: m.Values,
		})
	}
	return p, errors.Join(errs...)
}

// readRange reads one range; ok is false when it has no address.
func readRange(r v1beta1.IPRange) (got egress.Range, ok bool, err error) {
	switch {
	case r.CIDR != "" && (r.Start != "" || r.End != ""):
		return got, false, fmt.Errorf("range %s, %s-%s: want a cidr, or a start and an end, not both", r.CIDR, r.Start, r.End)
	case r.CIDR != "":
		return egress.ParseCIDR(r.CIDR)
	}
	got, err = egress.ParseRange(r.Start, r.End)
	return got, err == nil, err
}

func readSubnet(s *v1beta1.SubnetInfo) (*egress.Subnet, error) {
	if s == nil {
		return nil, nil
	}
	gateway, err := netip.ParseAddr(s.Gateway)
	if err != nil || gateway.Zone() != "" {
		return nil, fmt.Errorf("gateway %q: want an IPv4 or IPv6 address", s.Gateway)
	}
	gateway = gateway.Unmap()
	if s.PrefixLength < 1 || int(s.PrefixLength) > gateway.BitLen() {
		return nil, fmt.Errorf("prefixLength %d: want 1 to %d", s.PrefixLength, gateway.BitLen())
	}
	if s.VLAN < 0 || s.VLAN > 4094 {
		return nil, fmt.Errorf("vlan %d: want 1 to 4094, or 0 for none", s.VLAN)
	}
	return &egress.Subnet{Gateway: gateway, PrefixLength: int(s.PrefixLength), VLAN: int(s.VLAN)}, nil
}

// readNode reads a Node; capacity is that of nodes without the annotation. The record has no index yet. What is wrong with the node is
// left out of the record, and named by the error.
func readNode(n *corev1.Node, capacity int) (egress.Node, error) {
	out := egress.Node{Name: n.Name, Addresses: []netip.Addr{}, Labels: n.Labels, Capacity: capacity, Cordoned: n.Spec.Unschedulable}
	var errs []error
	for _, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		if ip, err := netip.ParseAddr(a.Address); err != nil || ip.Zone() != "" {
			errs = append(errs, fmt.Errorf("InternalIP %q: want an IPv4 or IPv6 address", a.Address))
		} else if ip = ip.Unmap(); !slices.Contains(out.Addresses, ip) {
			out.Addresses = append(out.Addresses, ip)
		}
	}
	for _, text := range named(n.Spec.PodCIDR, n.Spec.PodCIDRs) {
		if p, err := netip.ParsePrefix(text); err != nil {
			errs = append(errs, fmt.Errorf("podCIDR %q: want an address and a prefix length", text))
		} else {
			out.PodCIDRs = append(out.PodCIDRs, p.Masked())
		}
	}
	if text, ok := n.Annotations[capacityAnnotation]; ok {
		limit, err := strconv.Atoi(text)
		switch {
		case err != nil || limit < 0 || limit > maxCapacity:
			errs = append(errs, fmt.Errorf("annotation %s %q: want 0 to %d", capacityAnnotation, text, maxCapacity))
		case limit == 0: // the record's 0 means no limit; a node that takes none is what cordoned means
			out.Cordoned = true
		default:
			out.Capacity = limit
		}
	}
	return out, errors.Join(errs...)
}

// family is an IP family, by the length of its addresses in bits.
type family int

const (
	ipv4 family = 32
	ipv6 family = 128
)

var families = []family{ipv4, ipv6}

func familyOf(ip netip.Addr) family { return family(ip.BitLen()) }

// byAge orders demands as they are served: the oldest first, then by name.
func byAge(a, b demand) int {
	return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.name, b.name))
}

package spec

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/api/validate/content"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
)

// Addresses returns the addresses that an Egress names, at most one of each IP family, and the names of its pools.
func Addresses(s v1beta1.EgressSpec) (ips []netip.Addr, pools []string, err error) {
	// The webhook is asked about what no API server has looked at, too.
	if n := max(len(s.EgressIPs), len(s.ExternalIPPools)); n > 2 {
		return nil, nil, fmt.Errorf("egressIPs or externalIPPools has %d: want at most one of each IP family", n)
	}
	var errs []error
	var written []v1beta1.IP
	for _, text := range named(s.EgressIP, s.EgressIPs) {
		ip, err := address("egressIP", text)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		i := slices.IndexFunc(ips, func(o netip.Addr) bool { return o.Is4() == ip.Is4() })
		if i < 0 {
			ips, written = append(ips, ip), append(written, text)
		} else if ips[i] != ip {
			errs = append(errs, fmt.Errorf("egressIPs %s and %s: want at most one of each IP family", written[i], text))
		}
	}
	pools = named(s.ExternalIPPool, s.ExternalIPPools)
	if len(pools) == 0 && len(ips) == 0 && errs == nil {
		errs = append(errs, errors.New("neither egressIP nor externalIPPool is set: want one of them, or both"))
	}
	return ips, pools, errors.Join(errs...)
}

// named returns the values of a singular field and of its plural, each once, without empty ones.
func named[T ~string](one T, more []T) []T {
	var out []T
	for _, s := range append([]T{one}, more...) {
		if s != "" && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// address returns an address in the one form that it is compared in.
func address(field string, text v1beta1.IP) (netip.Addr, error) {
	ip, err := netip.ParseAddr(string(text))
	if err != nil || ip.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s %q: want an IPv4 or IPv6 address", field, text)
	}
	ip = ip.Unmap()
	return ip, unicast(field, text, ip)
}

// unicast refuses addresses that no packet can leave with, and quotes the text: a loopback or link-local one, a
// group's, none.
func unicast(field string, text v1beta1.IP, ip netip.Addr) error {
	if ip.IsGlobalUnicast() {
		return nil
	}
	return fmt.Errorf("%s %s: want a unicast address, neither loopback nor link-local", field, text)
}

// PoolOf returns which of the named pools an address is of; the empty name when none are named: the address is static.
// A pool that is not among pools has no address.
func PoolOf(ip netip.Addr, names []string, pools map[string]egress.Pool) (string, error) {
	if len(names) == 0 {
		return "", nil
	}
	var missing, ranges []string
	for _, name := range names {
		p, ok := pools[name]
		switch {
		case !ok:
			missing = append(missing, fmt.Sprintf("pool %s does not exist", name))
		case p.Contains(ip):
			return name, nil
		case p.Subnet != nil && p.Subnet.Gateway == ip:
			ranges = append(ranges, "any other, for this one is the gateway of its subnet")
		default:
			for _, r := range p.Ranges {
				ranges = append(ranges, r.Around(ip))
			}
		}
	}
	want := append(slices.Clip(missing), "want a pool that has it, or no egressIP")
	if len(ranges) > maxFaults {
		ranges = append(ranges[:maxFaults], "and more")
	}
	if len(ranges) > 0 {
		want[len(want)-1] = "want one of " + strings.Join(ranges, ", ")
	}
	fault := fmt.Sprintf("egressIP %s is not an address of pool %s: ", ip, strings.Join(names, " or "))
	const brief = "want a pool that has it, or no egressIP; `kubectl get externalippools -o yaml` has their ranges, " +
		"in which the first and the last address of an IPv4 cidr and the gateway of subnetInfo do not count"
	return "", conflict{errors.New(fault + strings.Join(want, ", ")), fault + strings.Join(append(missing, brief), ", ")}
}

// Families names two pools of which an Egress could have no more than one address: both have those of one IP family
// only. Pools that are not among pools have either, and so has one without a range.
func Families(names []string, pools map[string]egress.Pool) error {
	seen := map[bool]string{}
	for _, name := range names {
		ranges := pools[name].Ranges
		if len(ranges) == 0 || slices.ContainsFunc(ranges, func(r egress.Range) bool { return r.Start.Is4() != ranges[0].Start.Is4() }) {
			continue
		}
		is4 := ranges[0].Start.Is4()
		if other, ok := seen[is4]; ok {
			return fmt.Errorf("externalIPPools %s and %s are of one IP family: want at most one of each", other, name)
		}
		seen[is4] = name
	}
	return nil
}

// Bandwidth reads a bandwidth; nil of nil.
func Bandwidth(b *v1beta1.Bandwidth) (*egress.Bandwidth, error) {
	if b == nil {
		return nil, nil
	}
	rate, rateErr := quantity("rate", b.Rate)
	burst, burstErr := quantity("burst", b.Burst)
	if err := errors.Join(rateErr, burstErr); err != nil {
		return nil, err
	}
	return &egress.Bandwidth{Rate: rate, Burst: burst}, nil
}

func quantity(field string, text v1beta1.Quantity) (int64, error) {
	q, err := resource.ParseQuantity(string(text))
	if err != nil || q.Sign() <= 0 || q.CmpInt64(math.MaxInt64) > 0 {
		return 0, fmt.Errorf("bandwidth %s %q: want a quantity above 0 and at most %d, like 300k, 100M or 2G", field, text, math.MaxInt64)
	}
	if strings.TrimRight(string(text), "num") != string(text) { // 100m is easily typed for 100M
		return 0, fmt.Errorf("bandwidth %s %q: want no thousandths: 100m is a tenth, 100M a hundred million", field, text)
	}
	return q.Value(), nil
}

// AppliedTo returns the selectors of namespaces and of pods: a pod is selected when both match.
func AppliedTo(a v1beta1.AppliedTo) (namespaces, pods labels.Selector, err error) {
	if a.PodSelector == nil && a.NamespaceSelector == nil {
		return labels.Nothing(), labels.Nothing(), nil
	}
	namespaces, nsErr := orEverything("appliedTo.namespaceSelector", a.NamespaceSelector)
	pods, podErr := orEverything("appliedTo.podSelector", a.PodSelector)
	return namespaces, pods, errors.Join(nsErr, podErr)
}

func orEverything(field string, s *v1beta1.LabelSelector) (labels.Selector, error) {
	if s == nil {
		return labels.Everything(), nil
	}
	return selector(field, s)
}

// selector reads a label selector. Where several labels are wrong, they are named in one order each time.
func selector(field string, s *v1beta1.LabelSelector) (labels.Selector, error) {
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(s.MatchLabels)) {
		at := field + ".matchLabels"
		errs = append(errs, labelKey(at, key), labelValues(fmt.Sprintf("%s[%s]", at, key), s.MatchLabels[key]))
	}
	for i, e := range s.MatchExpressions {
		at := fmt.Sprintf("%s.matchExpressions[%d]", field, i)
		errs = append(errs, labelKey(at, e.Key), labelValues(at, e.Values...))
		switch e.Operator {
		case metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn:
			if len(e.Values) == 0 {
				errs = append(errs, fmt.Errorf("%s: operator %s without values: want one at least", at, e.Operator))
			}
		case metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist:
			if len(e.Values) > 0 {
				errs = append(errs, fmt.Errorf("%s: operator %s with values %q: want none", at, e.Operator, e.Values))
			}
		default:
			errs = append(errs, fmt.Errorf("%s: operator %q: want In, NotIn, Exists or DoesNotExist", at, e.Operator))
		}
	}
	if err := join(slices.DeleteFunc(errs, func(err error) bool { return err == nil })); err != nil {
		return nil, err
	}
	out, err := metav1.LabelSelectorAsSelector(s.Kubernetes())
	if err != nil { // nothing that is known
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return out, nil
}

func labelKey(field, key string) error {
	if len(content.IsLabelKey(key)) == 0 {
		return nil
	}
	return fmt.Errorf("%s: key %q: want the name of a label, like app or example.com/app", field, key)
}

func labelValues(field string, values ...v1beta1.LabelValue) error {
	for _, v := range values {
		if len(content.IsLabelValue(string(v))) > 0 {
			return fmt.Errorf("%s: value %q: want at most 63 letters, digits, - _ and ., the first and the last a letter or digit", field, v)
		}
	}
	return nil
}

package crdsync

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/crdsync/spec"
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
	uid        types.UID
	created    time.Time
	generation int64
	ips        []netip.Addr // that the spec names, at most one of each family
	pools      []string     // that the spec names
	statusIPs  []netip.Addr // that the status names
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
	d := demand{name: u.GetName(), uid: u.GetUID(), created: u.GetCreationTimestamp().UTC(), generation: u.GetGeneration()}
	var e v1beta1.Egress
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &e); err != nil {
		err = fmt.Errorf("reading the object: %w", err)
		d.addressErr, d.bandwidthErr, d.selectorErr = err, err, err
		return d
	}
	d.ips, d.pools, d.addressErr = spec.Addresses(e.Spec)
	had := []string{e.Status.EgressIP} // as a former version, or Antrea, wrote it
	for _, a := range e.Status.Addresses {
		had = append(had, a.IP)
	}
	for _, text := range had { // hints and nothing more
		if ip, err := netip.ParseAddr(text); err == nil && !slices.Contains(d.statusIPs, ip.Unmap()) {
			d.statusIPs = append(d.statusIPs, ip.Unmap())
		}
	}
	d.bandwidth, d.bandwidthErr = spec.Bandwidth(e.Spec.Bandwidth)
	d.applied.namespaces, d.applied.pods, d.selectorErr = spec.AppliedTo(e.Spec.AppliedTo)
	return d
}

// readPool reads an ExternalIPPool. An error names everything that is wrong with it.
func readPool(u *unstructured.Unstructured) (egress.Pool, error) {
	var e v1beta1.ExternalIPPool
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &e); err != nil {
		return egress.Pool{}, fmt.Errorf("reading the object: %w", err)
	}
	p, err := spec.Pool(u.GetName(), e.Spec)
	p.UID = string(u.GetUID())
	return p, err
}

// nodeDefaults say how nodes are read: the capacity of one without the annotation, whether Kubernetes' own cordon
// counts, and the key of a taint that is kept beside those of nodes that leave.
type nodeDefaults struct {
	capacity     int
	followCordon bool
	startupTaint string
}

// taintsOfLeaving are those of nodes that are shut down, or will be: set by an operator, a cloud's controller, the
// autoscaler.
var taintsOfLeaving = []string{corev1.TaintNodeOutOfService, "node.cloudprovider.kubernetes.io/shutdown", "ToBeDeletedByClusterAutoscaler"}

// leavingTaints returns the taints by which a node is known to be shut down, or about to be.
func leavingTaints(n *corev1.Node) []corev1.Taint {
	var out []corev1.Taint
	for _, t := range n.Spec.Taints {
		if slices.Contains(taintsOfLeaving, t.Key) {
			out = append(out, t)
		}
	}
	return out
}

// shutdown returns the condition by which a kubelet says that its node is shutting down gracefully. It sets no taint of
// its own for that: those that follow (node.kubernetes.io/not-ready and unreachable) say no more than that Kubernetes
// does not hear from the kubelet, which is no reason for an IP to move.
func shutdown(n *corev1.Node) []corev1.NodeCondition {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue && strings.Contains(c.Reason+" "+c.Message, "node is shutting down") {
			return []corev1.NodeCondition{c}
		}
	}
	return nil
}

// readNode reads a Node. The record has no index yet. What is wrong with the node is
// left out of the record, and named by the error.
func readNode(n *corev1.Node, d nodeDefaults) (egress.Node, error) {
	out := egress.Node{Name: n.Name, Addresses: []netip.Addr{}, Labels: n.Labels, Capacity: d.capacity}
	out.Cordoned = d.followCordon && (n.Spec.Unschedulable || len(leavingTaints(n)) > 0 || len(shutdown(n)) > 0)
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
	cidrs := n.Spec.PodCIDRs // the first of them is PodCIDR
	if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
		cidrs = []string{n.Spec.PodCIDR}
	}
	for _, text := range cidrs {
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

// readServiceCIDR reads a ServiceCIDR. What is wrong with it is left out of the record, and named by the error.
func readServiceCIDR(s *networkingv1.ServiceCIDR) (egress.ServiceCIDR, error) {
	out := egress.ServiceCIDR{Name: s.Name, CIDRs: []netip.Prefix{}}
	var errs []error
	for _, text := range s.Spec.CIDRs {
		if p, err := netip.ParsePrefix(text); err != nil {
			errs = append(errs, fmt.Errorf("CIDR %q: want an address and a prefix length", text))
		} else {
			out.CIDRs = append(out.CIDRs, p.Masked())
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

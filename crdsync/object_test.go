package crdsync

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/egress"
)

func yamlObject(t *testing.T, spec string) *unstructured.Unstructured {
	t.Helper()
	u := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(spec), &u.Object); err != nil {
		t.Fatal(err)
	}
	u.SetName("x")
	return u
}

func TestReadEgress(t *testing.T) {
	tests := map[string]struct {
		yaml       string
		ips, pools []string
		bandwidth  *egress.Bandwidth
		err        string // parts of it, separated by |
	}{
		"the guide's": {
			"spec: {egressIP: 10.10.0.8, externalIPPool: p, bandwidth: {rate: 800M, burst: 2G}}",
			[]string{"10.10.0.8"}, []string{"p"}, &egress.Bandwidth{Rate: 800e6, Burst: 2e9}, "",
		},
		"plural fields": {
			"spec: {egressIP: 10.10.0.8, egressIPs: ['10.10.0.8', 'fd00::0008'], externalIPPools: [p, q]}",
			[]string{"10.10.0.8", "fd00::8"}, []string{"p", "q"}, nil, "",
		},
		"an IPv4 address in IPv6 form": {"spec: {egressIP: '::ffff:10.10.0.8'}", []string{"10.10.0.8"}, nil, nil, ""},
		"an address of loopback":       {"spec: {egressIP: '::ffff:127.0.0.1', externalIPPool: p}", nil, []string{"p"}, nil, "egressIP ::ffff:127.0.0.1: want a unicast address, neither loopback nor link-local"},
		"two addresses of one family":  {"spec: {egressIPs: [10.10.0.8, 10.10.0.9]}", []string{"10.10.0.8"}, nil, nil, "10.10.0.8 and 10.10.0.9: want at most one"},
		"several faults": {
			"spec: {egressIP: 10.10.0, bandwidth: {rate: fast, burst: '-1'}, appliedTo: {podSelector: {matchExpressions: [{key: a, operator: Near}]}}}",
			nil, nil, nil,
			`egressIP "10.10.0"|rate "fast"|burst "-1"|podSelector`,
		},
		"no address and no pool": {"spec: {}", nil, nil, nil, "neither egressIP nor externalIPPool"},
		"another type":           {"spec: {egressIP: [1]}", nil, nil, nil, "reading the object"},
		"a bad bandwidth alone":  {"spec: {externalIPPool: p, bandwidth: {rate: 1M, burst: '0'}}", nil, []string{"p"}, nil, "burst"},
	}
	for name, tt := range tests {
		d := readEgress(yamlObject(t, tt.yaml))
		var ips []string
		for _, ip := range d.ips {
			ips = append(ips, ip.String())
		}
		if diff := cmp.Diff(tt.ips, ips) + cmp.Diff(tt.pools, d.pools) + cmp.Diff(tt.bandwidth, d.bandwidth); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		wantError(t, name, d.err(), tt.err)
	}
}

// An etcd that is empty, or older than the egress, does not know what it had. Its status does, of both families.
func TestTheStatusOfAnEgressTellsWhichAddressesItHad(t *testing.T) {
	for status, want := range map[string]string{
		"{}":                    "[]",
		"{egressIP: 10.10.0.8}": "[10.10.0.8]",
		"{egressIP: 10.10.0.8, addresses: [{ip: 10.10.0.8, node: a}, {ip: 'fd00::8', node: b}]}": "[10.10.0.8 fd00::8]",
		"{addresses: [{ip: nonsense}, {ip: 'fd00::8'}]}":                                         "[fd00::8]",
	} {
		if got := fmt.Sprint(readEgress(yamlObject(t, "spec: {externalIPPools: [p, q]}\nstatus: "+status)).statusIPs); got != want {
			t.Errorf("%s: %s, want %s", status, got, want)
		}
	}
}

func wantError(t *testing.T, name string, err error, parts string) {
	t.Helper()
	if (err != nil) != (parts != "") {
		t.Errorf("%s: error %v, want %q", name, err, parts)
		return
	}
	for _, part := range strings.Split(parts, "|") {
		if err != nil && !strings.Contains(err.Error(), part) {
			t.Errorf("%s: error %v does not say %q", name, err, part)
		}
	}
}

func TestReadPool(t *testing.T) {
	tests := map[string]struct {
		yaml string
		want egress.Pool
		err  string
	}{
		"the guide's": {
			`spec: {ipRanges: [{start: 10.10.0.2, end: 10.10.0.10}, {cidr: 10.10.1.0/28}, {cidr: 10.10.2.0/32}],
  subnetInfo: {gateway: 10.10.0.1, prefixLength: 16, vlan: 10}, nodeSelector: {matchLabels: {network-role: egress-gateway}}}`,
			egress.Pool{
				Name: "x", Ranges: poolOf("", "10.10.0.2", "10.10.0.10", "10.10.1.1", "10.10.1.14").Ranges,
				Subnet:       &egress.Subnet{Gateway: ip("10.10.0.1"), PrefixLength: 16, VLAN: 10},
				NodeSelector: egress.Selector{MatchLabels: map[string]string{"network-role": "egress-gateway"}},
			}, "",
		},
		"faults": {
			`spec: {ipRanges: [{start: 10.10.0.2}, {cidr: 10.10.1.0}, {cidr: 10.10.1.0/28, start: 10.10.1.1}],
  subnetInfo: {gateway: here, prefixLength: 24}, nodeSelector: {matchExpressions: [{key: a, operator: In}]}}`,
			egress.Pool{}, `start "10.10.0.2" without an end|cidr "10.10.1.0"|not both|gateway "here"|nodeSelector`,
		},
		"a prefix that is too long": {"spec: {subnetInfo: {gateway: 10.0.0.1, prefixLength: 64}}", egress.Pool{}, "prefixLength 64: want 1 to 31"},
	}
	for name, tt := range tests {
		got, err := readPool(yamlObject(t, tt.yaml))
		wantError(t, name, err, tt.err)
		if d := cmp.Diff(tt.want, got, compareIPs); err == nil && d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestReadNode(t *testing.T) {
	node := corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "node-1", Labels: map[string]string{"a": "b"}},
		Spec:       corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24", "fd00:1::/64"}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeHostName, Address: "node-1"}, {Type: corev1.NodeInternalIP, Address: "192.0.2.1"}, {Type: corev1.NodeInternalIP, Address: "fd00::1"},
		}},
	}
	want := egress.Node{
		Name: "node-1", Addresses: []netip.Addr{ip("192.0.2.1"), ip("fd00::1")}, Labels: map[string]string{"a": "b"}, Capacity: 5,
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:1::/64")},
	}
	tests := map[string]struct {
		annotation    string
		unschedulable bool
		taint         string
		ready         string // message of the Ready condition, which is False; empty: it is True
		ignore        bool   // --follow-kubernetes-cordon=false
		capacity      int
		cordoned      bool
		err           string
	}{
		"without an annotation":  {capacity: 5},
		"with a capacity":        {annotation: "12", capacity: 12},
		"nonsense":               {annotation: "many", capacity: 5, err: `max-egress-ips "many": want 0 to 255`},
		"too many":               {annotation: "256", capacity: 5, err: "want 0 to 255"},
		"none":                   {annotation: "0", capacity: 5, cordoned: true},
		"cordoned":               {unschedulable: true, capacity: 5, cordoned: true},
		"cordoned, not followed": {unschedulable: true, ignore: true, capacity: 5},
		"none, not followed":     {annotation: "0", ignore: true, capacity: 5, cordoned: true},
		"out of service":         {taint: "node.kubernetes.io/out-of-service", capacity: 5, cordoned: true},
		"shut down by the cloud": {taint: "node.cloudprovider.kubernetes.io/shutdown", capacity: 5, cordoned: true},
		"tainted, not followed":  {taint: "node.kubernetes.io/out-of-service", ignore: true, capacity: 5},
		"not heard of":           {taint: "node.kubernetes.io/unreachable", capacity: 5},
		"shutting down":          {ready: "[container runtime is down, node is shutting down]", capacity: 5, cordoned: true},
		"not ready":              {ready: "Kubelet stopped posting node status.", capacity: 5},
	}
	for name, tt := range tests {
		n := node.DeepCopy()
		n.Spec.Unschedulable = tt.unschedulable
		if tt.taint != "" {
			n.Spec.Taints = []corev1.Taint{{Key: "other"}, {Key: tt.taint}}
		}
		if tt.annotation != "" {
			n.Annotations = map[string]string{capacityAnnotation: tt.annotation}
		}
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		if tt.ready != "" {
			n.Status.Conditions[0].Status, n.Status.Conditions[0].Message = corev1.ConditionFalse, tt.ready
		}
		trimmed, err := nodeDefaults{}.trim(n)
		if err != nil {
			t.Fatal(err)
		}
		got, err := readNode(trimmed.(*corev1.Node), nodeDefaults{capacity: 5, followCordon: !tt.ignore})
		wantError(t, name, err, tt.err)
		want.Capacity, want.Cordoned = tt.capacity, tt.cordoned
		if d := cmp.Diff(want, got, compareIPs, cmpopts.EquateComparable(netip.Prefix{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

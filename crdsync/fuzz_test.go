package crdsync

import (
	"encoding/json"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utiljson "k8s.io/apimachinery/pkg/util/json"

	"github.com/egret-project/egret/egress"
)

// Whatever objects say, past the schema and the webhook: each is read, or is at fault, and agents read what is written
// of it as it was meant.
func FuzzObject(f *testing.F) {
	for _, object := range []string{
		`{"metadata":{"name":"x","generation":2,"creationTimestamp":"2026-01-02T03:04:05Z"},"spec":{"egressIP":"::ffff:10.0.0.1","externalIPPool":"p",` +
			`"appliedTo":{"podSelector":{"matchLabels":{"a":"b"}}},"bandwidth":{"rate":"1M","burst":"2M"}},"status":{"egressIP":"fe80::1%eth0"}}`,
		`{"spec":{"egressIPs":["10.0.0.1","fd00::1","10.0.0.2"],"externalIPPools":["p","p"],"bandwidth":{"rate":"1e400","burst":"-0"}}}`,
		`{"metadata":{"name":"p","uid":"1"},"spec":{"ipRanges":[{"cidr":"::/0"},{"start":"0.0.0.0","end":"255.255.255.255"}],"nodeSelector":{"matchLabels":{"a":"b"}},` +
			`"subnetInfo":{"gateway":"10.0.0.1","prefixLength":24,"vlan":7}}}`,
		`{"spec":{"ipRanges":[{"start":"fe80::1%a","end":"ffff::"},{"cidr":"10.0.0.0/33"}]}}`,
		`{"metadata":{"name":"n","annotations":{"node.antrea.io/max-egress-ips":"7"}},"spec":{"podCIDRs":["::ffff:10.0.0.0/104","10.244.0.0/24"],"taints":[{"key":"a"}]},` +
			`"status":{"addresses":[{"type":"InternalIP","address":"::ffff:10.0.0.1"},{"type":"InternalIP","address":"fe80::1%eth0"}]}}`,
		`{"metadata":{"namespace":"a","name":"b"},"spec":{"nodeName":"n"},"status":{"podIP":"10.0.0.1","podIPs":[{"ip":"::ffff:10.0.0.1"},{"ip":"fd00::1"}]}}`,
		`{"spec":{"cidrs":["10.96.0.0/16","fd00::/112","x"]}}`, `{"metadata":[],"spec":1,"status":null}`, `null`,
	} {
		f.Add([]byte(object))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var u unstructured.Unstructured
		if utiljson.Unmarshal(b, &u.Object) != nil {
			return
		}
		d := readEgress(&u)
		for i, ip := range d.ips {
			if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" || i > 0 && ip.Is4() == d.ips[0].Is4() {
				t.Errorf("%s asks for %v", b, d.ips)
			}
		}
		if d.err() == nil && len(d.ips)+len(d.pools) == 0 {
			t.Errorf("%s asks for nothing, and nothing is wrong with it", b)
		}
		_ = readStatus(&u)
		if p, err := readPool(&u); err == nil {
			for _, r := range p.Ranges {
				if r.Start.Is4() != r.End.Is4() || r.End.Less(r.Start) {
					t.Errorf("%s: range %v", b, r)
				}
			}
			same(t, p)
		}
		var n corev1.Node
		if json.Unmarshal(b, &n) == nil {
			got, _ := readNode(&n, nodeDefaults{capacity: 255, followCordon: true}) // what is wrong is left out
			plain(t, b, got.Addresses)
			same(t, got)
		}
		var pod corev1.Pod
		if json.Unmarshal(b, &pod) == nil {
			if got, ok := readPod(&pod); ok {
				plain(t, b, got.ips)
			}
		}
		var s networkingv1.ServiceCIDR
		if json.Unmarshal(b, &s) == nil {
			got, _ := readServiceCIDR(&s) // what is wrong is left out
			same(t, got)
		}
	})
}

// plain fails the test where addresses are not of one form each.
func plain(t *testing.T, b []byte, ips []netip.Addr) {
	for _, ip := range ips {
		if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" {
			t.Errorf("%s has the addresses %v", b, ips)
		}
	}
}

// same fails the test where a record is not read as it was written.
func same[T egress.Pool | egress.Node | egress.ServiceCIDR](t *testing.T, record T) {
	b, err := json.Marshal(record)
	if err != nil {
		t.Fatalf("%+v: %v", record, err)
	}
	var again T
	if err := json.Unmarshal(b, &again); err != nil {
		t.Errorf("%s: %v", b, err)
	}
	if twice, err := json.Marshal(again); err != nil || string(twice) != string(b) {
		t.Errorf("%s is read as %+v, and written as %s, %v", b, again, twice, err)
	}
}

package operator

import (
	"context"
	"encoding/json"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// valid is a record of each kind.
var valid = map[string]string{
	"pools/p":                  `{"name":"p","ranges":[{"start":"10.10.0.1","end":"10.10.0.99"}]}`,
	"egresses/web":             `{"name":"web","addresses":[{"ip":"10.10.0.11","id":1,"pool":"p"}]}`,
	"nodes/n1":                 `{"name":"n1","index":1,"addresses":["192.0.2.101"],"podCIDRs":["10.244.1.0/24"]}`,
	"agents/n1":                `{"node":"n1","address":"192.0.2.101","lease":"a1","ports":{"10.10.0.11":{"want":2048}}}`,
	"owners/10.10.0.11":        `{"ip":"10.10.0.11","node":"n1"}`,
	"moves/10.10.0.11":         `{"ip":"10.10.0.11","to":"n1"}`,
	"members/by-node/n1/web":   `{"egress":"web","node":"n1","pods":[{"pod":"default/a","ips":["10.244.1.2"]}]}`,
	"members/by-egress/web/n1": `{"egress":"web","node":"n1","pods":[{"pod":"default/a","ips":["10.244.1.2"]}],"blocks":[{"ip":"10.10.0.11","first":2048,"size":1024}]}`,
	"blocks/10.10.0.11/02048":  `{"ip":"10.10.0.11","first":2048,"size":1024,"node":"n1"}`,
	"suspicions/n1":            `{"node":"n1","lease":"a1"}`,
	"cordons/n1":               `{"node":"n1"}`,
	"pins/10.10.0.11":          `{"ip":"10.10.0.11","node":"n1"}`,
	"history/10.10.0.11/1-n1":  `{"ip":"10.10.0.11","node":"n1"}`,
	"allocations/10.10.0.11":   `{"ip":"10.10.0.11","id":1}`,
	"services/a":               `{"name":"a"}`,
	"pods/n1":                  `{"node":"n1","cidrs":["10.244.1.0/24"]}`,
}

// Who may write to etcd may write anything beside valid records, or in place of one: it is used, or it is a fault, and
// nothing falls.
func FuzzRecord(f *testing.F) {
	for key, value := range valid {
		f.Add(key, []byte(value))
	}
	f.Add("members/by-egress/web/n1/n2", []byte(`{"egress":null}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		records := map[string]store.Record{}
		for k, v := range valid {
			records[k] = store.Record{Value: []byte(v), Revision: 7}
		}
		records[key] = store.Record{Value: value, Revision: 8, Lease: 0xa1}
		w := store.WholeOf(9, records)
		if len(w.Faults) > 1 {
			t.Errorf("one record is not valid, and %d are at fault: %v", len(w.Faults), w.Faults)
		}
		cluster := plan.New(&w.Snapshot)
		for _, node := range []string{"n1", "n2"} {
			_ = plan.Build(cluster, plan.Facts{
				Node: node, Underlay: netip.MustParseAddr("192.0.2.101"), Uplink: plan.Link{Name: "eth0", Up: true, MTU: 1500},
			}, map[netip.Addr]plan.Role{netip.MustParseAddr("10.10.0.11"): plan.Own})
		}
		_ = troublesOf(w, store.Space{})
		_, _ = TraceIn(t.Context(), w, Question{Pod: "default/a"}, Kernels{}) // an error: there is no such pod
		for ip, o := range w.Owners {
			if ip != o.IP || egress.FormatLease(o.Lease) == "" {
				t.Errorf("%s is the key of %+v", ip, o)
			}
		}
	})
}

// An agent that was broken into answers anything: no more than a wrong verdict comes of it, and nothing that it says
// commands a terminal.
func FuzzAnswer(f *testing.F) {
	for _, answer := range []string{
		`{"node":"n1","watching":true,"permit_seconds":0.5,"answers":true,"pod_id":1,"steered":true,"ports_used_to":3,"dropped_packets":{"guard_dropped":1},` +
			`"path":{"overlay":{"to":"192.0.2.101","via":"192.0.2.1","silent":true,"neighbour":"FAILED"}}}`,
		`{"differs":["table inet egret\u001b]0;x\u0007"],"differed":-1,"permit_seconds":-1e300,"excepted":"10.0.0.0/8","path":{"diverted":"\u202e"}}`,
		`{"sent":true,"lost":true,"packets":[{"steps":[{"table":"x\u001b[2J","chain":"\u009b","verdict":"drop"}]}]}`,
		`{"uses":[{"pod_name":"a\u001b[31m","egress_ip":"10.10.0.11","port":2048,"event":"new"}],"missing":["\r\u0085"],"more":true,"late":true}`,
		`{"uses":[{"pod_node":"n1","overlay_ip":"192.0.2.101","overlay_port":9}]}`,
		`{"path":{"overlay":null}}`, `[]`,
	} {
		f.Add([]byte(answer))
	}
	ip := netip.MustParseAddr("10.10.0.11")
	f.Fuzz(func(t *testing.T, b []byte) {
		ask := func(_ context.Context, _ string, _ []netip.Addr, _ string, _ url.Values, reply any) error {
			return json.Unmarshal(b, reply)
		}
		records := map[string]store.Record{}
		for k, v := range valid {
			records[k] = store.Record{Value: []byte(v), Revision: 7, Lease: 0xa1}
		}
		w := store.WholeOf(9, records)
		q := Question{Pod: "default/a", To: netip.MustParseAddr("203.0.113.10"), Live: &Live{Protocol: 6, Port: 443}}
		way, err := TraceIn(t.Context(), w, q, Kernels{Ask: ask})
		if err != nil || len(way.Steps) == 0 || way.Status != 0 && way.Status != 2 && way.Status != 3 {
			t.Fatalf("%q: %+v, %v", b, way, err)
		}
		text := way.Verdict
		for _, s := range append(way.Steps, follow(t.Context(), w, q, ask)...) {
			text += "\n" + s.Text
		}
		cfg := WhoConfig{Ask: ask, Pages: [2]string{"kernel", "log"}, Now: true}
		cfg.IP, cfg.Port, cfg.From = ip, 2048, time.Unix(1000, 0)
		cfg.To = cfg.From.Add(time.Second)
		u := Used{IP: ip, Port: 2048, From: cfg.From, To: cfg.To}
		u.ask(t.Context(), cfg, "n1", nil)
		u.askPodNodes(t.Context(), cfg, w.Nodes)
		var out strings.Builder
		if err := u.text(&out); err != nil {
			t.Fatal(err)
		}
		if text += "\n" + out.String(); PrintableLines(text) != text {
			t.Errorf("%q is told as %q", b, text)
		}
	})
}

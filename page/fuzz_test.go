package page

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// Whoever looks at the page may ask anything, of records that are like it: he is answered, with JSON or with what is
// wrong with the question.
func FuzzQuestions(f *testing.F) {
	for _, query := range []string{
		"", "q=web", "q=10.10.0.1", "q=%00%ff", "pod=prod/web-1", "pod=prod/web-1&to=203.0.113.10&port=443", "pod=prod/web-1&to=fe80::1%25eth0&protocol=icmp",
		"pod=/&port=-1", "pod=prod/web-1&to=::ffff:10.0.0.1&port=65536&protocol=sctp", "kind=egress&name=web", "kind=ip&name=10.10.0.11", "kind=node&name=n1",
		"kind=pool&name=p", "kind=pod&name=prod/web-1", "kind=pod&name=a/b/c", "kind=&name=", "ips=10.10.0.11",
	} {
		f.Add(query)
	}
	records := map[string]store.Record{}
	for key, value := range map[string]string{
		"pools/p": `{"name":"p","ranges":[{"start":"10.10.0.1","end":"10.10.0.99"}]}`, "egresses/web": `{"name":"web","addresses":[{"ip":"10.10.0.11","id":1,"pool":"p"}]}`,
		"nodes/n1": `{"name":"n1","index":1,"addresses":["192.0.2.101"],"podCIDRs":["10.244.1.0/24"]}`, "agents/n1": `{"node":"n1","address":"192.0.2.101","lease":"a1"}`,
		"owners/10.10.0.11":        `{"ip":"10.10.0.11","node":"n1"}`,
		"members/by-node/n1/web":   `{"egress":"web","node":"n1","pods":[{"pod":"prod/web-1","ips":["10.244.1.2"]}]}`,
		"members/by-egress/web/n1": `{"egress":"web","node":"n1","pods":[{"pod":"prod/web-1","ips":["10.244.1.2"]}]}`,
	} {
		records[key] = store.Record{Value: []byte(value), Revision: 7, Lease: 0xa1}
	}
	p := New(nil, Agents{}, nil)
	p.shown = &shown{whole: store.WholeOf(9, records)}
	h := p.Handler()
	f.Fuzz(func(t *testing.T, query string) {
		for _, path := range []string{"/search", "/describe", "/trace", "/traffic"} {
			r := httptest.NewRequest(http.MethodGet, path, nil)
			r.URL.RawQuery = query
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			switch w.Code {
			case http.StatusBadRequest, http.StatusNotFound:
			case http.StatusOK:
				if !json.Valid(w.Body.Bytes()) {
					t.Errorf("%s?%s is answered by %q", path, query, w.Body)
				}
			default:
				t.Errorf("%s?%s: %d %s", path, query, w.Code, w.Body)
			}
		}
	})
}

// Whoever looks at the page may ask for anything: he gets what has one form, and not too much of it.
func FuzzIPs(f *testing.F) {
	for _, text := range []string{"", "10.10.0.11", "10.10.0.11,fd00::b1", "::ffff:10.10.0.11", "fe80::1%eth0", ",", strings.Repeat("::,", maxTraffic) + "::"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ips, err := parseIPs(text)
		if err != nil {
			return
		}
		if len(ips) == 0 || len(ips) > maxTraffic {
			t.Errorf("%q: %d addresses", text, len(ips))
		}
		var again []string
		for _, ip := range ips {
			if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" {
				t.Errorf("%q has %v", text, ip)
			}
			again = append(again, ip.String())
		}
		if same, err := parseIPs(strings.Join(again, ",")); err != nil || fmt.Sprint(same) != fmt.Sprint(ips) {
			t.Errorf("%q is %v, and then %v, %v", text, ips, same, err)
		}
	})
}

// An agent that was broken into answers anything, and then anything else: what is shown of it is JSON, and no rate is
// below nothing.
func FuzzTraffic(f *testing.F) {
	for _, answer := range []string{
		`{"node":"n1","read":1000000000,"ips":{"10.10.0.11":{"sentPackets":1,"sentBytes":100,"receivedBytes":7}}}`,
		`{"node":"n1","read":3000000000,"ips":{"10.10.0.11":{"sentBytes":18446744073709551615},"fe80::1%eth0":{}}}`,
		`{"node":"n1","read":-9223372036854775808}`, `{"read":9223372036854775807,"ips":{"10.10.0.11":{}}}`, `{"ips":null}`, `[]`,
	} {
		f.Add([]byte(answer), []byte(`{"node":"n1","read":1,"ips":{"10.10.0.11":{}}}`))
		f.Add([]byte(`{"node":"n1","read":1,"ips":{"10.10.0.11":{}}}`), []byte(answer))
	}
	ip := netip.MustParseAddr("10.10.0.11")
	f.Fuzz(func(t *testing.T, first, second []byte) {
		now := first
		g := newGateways(func(context.Context, string, []netip.Addr) (answer egress.NodeTraffic, err error) {
			err = json.Unmarshal(now, &answer)
			return answer, err
		})
		for _, now = range [][]byte{first, second} {
			last, before, err := g.read(t.Context(), "n1", nil)
			row := rowOf(ip, "n1", last, before, err)
			if b, err := json.Marshal(row); err != nil || !json.Valid(b) || row.SentRate < 0 || row.ReceivedRate < 0 {
				t.Errorf("%q and then %q are shown as %+v: %v", first, second, row, err)
			}
			g.of["n1"].due = time.Time{} // it is asked again
		}
	})
}

package admission

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
)

func testReviewer() *reviewer {
	range1 := egress.Range{Start: netip.MustParseAddr("10.0.0.1"), End: netip.MustParseAddr("10.0.0.9")}
	return &reviewer{
		pools: func(context.Context) (map[string]egress.Pool, map[string]error, error) {
			return map[string]egress.Pool{"p": {Name: "p", Ranges: []egress.Range{range1}}}, map[string]error{"bad": errors.New("bad")}, nil
		},
		inUse: func(context.Context) ([]egress.Allocation, error) {
			return []egress.Allocation{{IP: range1.Start, Pool: "p", Egresses: []string{"web"}}}, nil
		},
		log: slog.New(slog.DiscardHandler),
	}
}

func post(r *reviewer, body []byte) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	r.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Path, bytes.NewReader(body)))
	return w
}

func reviewOf(resource string, object, old string) []byte {
	req := &admissionv1.AdmissionRequest{
		UID: "1", Operation: admissionv1.Create, Resource: metav1.GroupVersionResource(v1beta1.GroupVersion.WithResource(resource)),
		Object: runtime.RawExtension{Raw: []byte(object)},
	}
	if old != "" {
		req.Operation, req.OldObject.Raw = admissionv1.Update, []byte(old)
	}
	// an object that is no JSON makes no review: a body that is empty
	b, _ := json.Marshal(admissionv1.AdmissionReview{Request: req})
	return b
}

func TestReviews(t *testing.T) {
	wrong := `{"metadata":{"name":"x"},"spec":{"externalIPPool":"p","egressIP":"10.9.9.9"}}`
	unreadable := errors.New("etcd has not been read yet")
	blind := testReviewer()
	blind.pools = func(context.Context) (map[string]egress.Pool, map[string]error, error) { return nil, nil, unreadable }
	deaf := testReviewer()
	deaf.inUse = func(context.Context) ([]egress.Allocation, error) { return nil, unreadable }
	pool := `{"metadata":{"name":"x"},"spec":{"ipRanges":[{"cidr":"10.1.0.0/24"}],"nodeSelector":{}}}`
	for name, tt := range map[string]struct {
		reviewer *reviewer
		body     []byte
		code     int
		allowed  bool
	}{
		"a good one":                       {testReviewer(), reviewOf("egresses", strings.ReplaceAll(wrong, "9.9.9", "0.0.9"), ""), 200, true},
		"a wrong one":                      {testReviewer(), reviewOf("egresses", wrong, ""), 200, false},
		"a wrong one that was so before":   {testReviewer(), reviewOf("egresses", wrong, wrong), 200, true},
		"a wrong one that is being ended":  {testReviewer(), reviewOf("egresses", strings.Replace(wrong, `"x"`, `"x","deletionTimestamp":"2026-01-01T00:00:00Z"`, 1), pool), 200, true},
		"an egress of a pool like that":    {testReviewer(), reviewOf("egresses", strings.ReplaceAll(wrong, `"p"`, `"bad"`), ""), 200, true},
		"a type that is not the field's":   {testReviewer(), reviewOf("egresses", `{"spec":{"egressIP":1}}`, ""), 200, false},
		"a pool":                           {testReviewer(), reviewOf("externalippools", pool, ""), 200, true},
		"another kind":                     {testReviewer(), reviewOf("others", wrong, ""), 200, true},
		"pools that cannot be listed":      {blind, reviewOf("egresses", wrong, ""), 500, false},
		"a pool without the others":        {blind, reviewOf("externalippools", pool, ""), 500, false},
		"a static address needs no pools":  {blind, reviewOf("egresses", `{"spec":{"egressIP":"10.0.0.1"}}`, ""), 200, true},
		"allocations that are not known":   {deaf, reviewOf("externalippools", pool, ""), 500, false},
		"no JSON":                          {testReviewer(), []byte("{"), 400, false},
		"no request":                       {testReviewer(), []byte("{}"), 400, false},
		"more than an API server may send": {testReviewer(), bytes.Repeat([]byte(" "), maxReview+1), 400, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := post(tt.reviewer, tt.body)
			var got admissionv1.AdmissionReview
			if w.Code == 200 {
				if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || got.Response.UID != "1" {
					t.Fatalf("%v in %s", err, w.Body)
				}
			}
			if w.Code != tt.code || tt.code == 200 && got.Response.Allowed != tt.allowed {
				t.Errorf("code %d, %s; want %d, allowed %v", w.Code, w.Body, tt.code, tt.allowed)
			}
		})
	}
}

// What a review says of other objects goes to those alone who have shown an API server's certificate. Others learn
// whether something is in the way of the object that they bring.
func TestAReviewNamesWhatOthersHaveToAPIServersAlone(t *testing.T) {
	const (
		beside = `{"metadata":{"name":"x"},"spec":{"externalIPPool":"p","egressIP":"10.0.0.77"}}`
		all    = `{"metadata":{"name":"x"},"spec":{"ipRanges":[{"cidr":"8.0.0.0/5"}],"nodeSelector":{}}}`
		was    = `{"metadata":{"name":"p"},"spec":{"ipRanges":[{"cidr":"8.0.0.0/5"}],"nodeSelector":{}}}`
		none   = `{"metadata":{"name":"p"},"spec":{"ipRanges":[],"nodeSelector":{}}}`
		taken  = `{"metadata":{"name":"p"},"spec":{"ipRanges":[{"cidr":"8.0.0.0/5"}],"subnetInfo":{"gateway":"10.0.0.1","prefixLength":5},"nodeSelector":{}}}`
	)
	blind := testReviewer()
	blind.pools = func(context.Context) (map[string]egress.Pool, map[string]error, error) {
		return nil, nil, errors.New("listing pools: https://10.96.0.1:443 refuses system:serviceaccount:egret-system:egret-crdsync")
	}
	if asked, anybody := (&server{Config: Config{Clients: []string{"api-1"}}}).reviewer(), new(server).reviewer(); !asked.frank || anybody.frank {
		t.Errorf("with clients who show a certificate names are told: %v; without: %v", asked.frank, anybody.frank)
	}
	for name, tt := range map[string]struct {
		reviewer         *reviewer
		body             []byte
		says             string
		others           []string
		withoutItsOthers string
	}{
		"an address of no pool": {testReviewer(), reviewOf("egresses", beside, ""), "want one of 10.0.0.1-10.0.0.9", []string{"10.0.0.1", "10.0.0.9"},
			"egressIP 10.0.0.77 is not an address of pool p: want a pool that has it"},
		"ranges of others": {testReviewer(), reviewOf("externalippools", all, ""), "8.0.0.0/5 overlaps with 10.0.0.1-10.0.0.9 of pool p", []string{"10.0.0.1", "pool p"},
			"ipRanges: 8.0.0.0/5 overlaps with another pool"},
		"addresses in use": {testReviewer(), reviewOf("externalippools", none, was), "10.0.0.1 is in use by egress web", []string{"10.0.0.1", "web"},
			"ipRanges: an address is in use: want its range 8.0.0.0/5 kept"},
		"a gateway in use": {testReviewer(), reviewOf("externalippools", taken, was), "gateway 10.0.0.1 is in use by egress web", []string{"web"},
			"subnetInfo: gateway 10.0.0.1 is in use: want another gateway"},
		"what keeps it from being told": {blind, reviewOf("externalippools", all, ""), "egret-crdsync", []string{"10.96.0.1", "system:"}, "crdsync's log says why"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.reviewer.frank = true
			if frank := post(tt.reviewer, tt.body).Body.String(); !strings.Contains(frank, tt.says) {
				t.Errorf("an API server is told %s; want %q", frank, tt.says)
			}
			tt.reviewer.frank = false
			got := post(tt.reviewer, tt.body).Body.String()
			if !strings.Contains(got, tt.withoutItsOthers) {
				t.Errorf("anybody is told %s; want %q", got, tt.withoutItsOthers)
			}
			for _, o := range tt.others {
				if strings.Contains(got, o) {
					t.Errorf("anybody is told of %q: %s", o, got)
				}
			}
		})
	}
}

// However much is in the way, and however long the words of who asks are, an answer is short.
func TestAReviewsAnswerIsBounded(t *testing.T) {
	long := strings.Repeat("\u00e4", 1<<20)
	r := testReviewer()
	used := map[string]egress.Pool{}
	var inUse []egress.Allocation
	for i := range 1000 {
		ip := netip.AddrFrom4([4]byte{10, 0, byte(i / 100), byte(i % 100)})
		name := strings.Repeat("x", 200) + ip.String()
		used[name] = egress.Pool{Name: name, Ranges: []egress.Range{{Start: ip, End: ip}}}
		inUse = append(inUse, egress.Allocation{IP: ip, Pool: "p", Egresses: []string{name}})
	}
	r.pools = func(context.Context) (map[string]egress.Pool, map[string]error, error) { return used, nil, nil }
	r.inUse = func(context.Context) ([]egress.Allocation, error) { return inUse, nil }
	pool := func(ranges string) string {
		return `{"metadata":{"name":"p"},"spec":{"ipRanges":[` + ranges + `],"nodeSelector":{}}}`
	}
	const all, half = `{"cidr":"10.0.0.0/8"}`, `{"cidr":"10.0.0.0/9"},{"cidr":"10.200.0.0/16"}`
	for _, r.frank = range []bool{false, true} {
		for name, body := range map[string][]byte{
			"a range of many pools":    reviewOf("externalippools", pool(half), pool(all)),
			"all are taken away":       reviewOf("externalippools", pool(""), pool(all)),
			"a long address":           reviewOf("egresses", `{"spec":{"egressIP":"`+long+`"}}`, ""),
			"a long name of a pool":    reviewOf("egresses", `{"spec":{"egressIP":"10.0.0.1","externalIPPool":"`+long+`"}}`, ""),
			"a long cidr":              reviewOf("externalippools", pool(`{"cidr":"`+long+`"}`), ""),
			"a type that is not known": reviewOf("egresses", `{"spec":{"bandwidth":{"rate":"`+long+`"}}}`, ""),
		} {
			w := post(r, body)
			var got admissionv1.AdmissionReview
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || got.Response.Allowed || got.Response.Result.Message == "" {
				t.Errorf("%s: %v, %.300s", name, err, w.Body)
			}
			if n := w.Body.Len(); n > maxTold+1000 {
				t.Errorf("%s: the answer has %d bytes", name, n)
			}
		}
	}
}

// FuzzReview: no object makes the webhook panic, and each gets an answer.
func FuzzReview(f *testing.F) {
	seeds := []string{
		`{"metadata":{"name":"x"},"spec":{"appliedTo":{"podSelector":{"matchLabels":{"a b":"c"}}},"egressIP":"::ffff:10.0.0.1","externalIPPool":"p"}}`,
		`{"spec":{"egressIPs":["10.0.0.1","fd00::1%eth0",""],"externalIPPools":["p","p",""],"bandwidth":{"rate":"1e400","burst":"-0"}}}`,
		`{"spec":{"appliedTo":{"namespaceSelector":{"matchExpressions":[{"key":"","operator":"Near","values":[""]}]}}}}`,
		`{"metadata":{"name":"p"},"spec":{"ipRanges":[{"cidr":"::/0"},{"start":"0.0.0.0","end":"255.255.255.255"},{"cidr":"0.0.0.0/0"}],"nodeSelector":{}}}`,
		`{"metadata":{"name":"q"},"spec":{"ipRanges":[{"start":"fe80::1%a","end":"ffff::"},{"cidr":"10.0.0.0/33"}],"subnetInfo":{"gateway":"10.0.0.1","prefixLength":-1,"vlan":4095}}}`,
		`{"metadata":{"name":"p"},"spec":{"ipRanges":[{"start":"10.0.0.2","end":"10.0.0.9"}],"subnetInfo":{"gateway":"::","prefixLength":127}}}`,
		`{"spec":null}`, `null`, `[]`,
	}
	for _, s := range seeds {
		f.Add(s, "")
		f.Add(s, seeds[3])
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, object, old string) {
		for _, resource := range []string{"egresses", "externalippools"} {
			w := post(testReviewer(), reviewOf(resource, object, old))
			if json.Valid([]byte(object)) && (old == "" || json.Valid([]byte(old))) && w.Code != http.StatusOK {
				t.Errorf("%s: code %d, %s", resource, w.Code, w.Body)
			}
			post(testReviewer(), []byte(object))
		}
	})
}

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

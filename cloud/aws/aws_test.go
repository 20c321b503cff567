package aws

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/x509roots/fallback/bundle"

	"github.com/egret-project/egret/cloud"
	"github.com/egret-project/egret/internal/ec2test"
)

func open(t *testing.T, url string) *EC2 {
	t.Helper()
	e, err := New(t.Context(), Config{Region: ec2test.Region, VPC: ec2test.VPC, Endpoint: url, Credentials: ec2test.Credentials})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestHoldersAreReadPageByPage(t *testing.T) {
	s := ec2test.New(t)
	want := map[netip.Addr]string{}
	var all []netip.Addr
	for _, n := range []string{"1", "2", "3", "4", "5", "6", "7"} {
		four, six := netip.MustParseAddr("10.0.0."+n), netip.MustParseAddr("fd00::"+n)
		s.Add("eni-"+n, 1, four.String(), six.String())
		want[four], want[six] = "eni-"+n, "eni-"+n
		all = append(all, four, six)
	}
	for i := range 250 { // of more than one request, which nobody has
		all = append(all, netip.AddrFrom4([4]byte{10, 0, 9, byte(i)}))
	}
	got, err := open(t, s.URL).Holders(t.Context(), all)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestEachPageHasATimeOfItsOwn(t *testing.T) {
	s := ec2test.New(t)
	e := open(t, s.URL)
	e.pageLimit = 6 * time.Second
	var all []netip.Addr
	for i := range 30 { // 10 pages
		ip := netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})
		s.Add("eni-"+ip.String(), 1, ip.String())
		all = append(all, ip)
	}
	s.Fault(func(ec2test.Call) ec2test.Fault { return ec2test.Fault{Delay: 650 * time.Millisecond} })
	if got, err := e.Holders(t.Context(), all); err != nil || len(got) != len(all) {
		t.Errorf("%d addresses of %d, %v", len(got), len(all), err)
	}
	e.pageLimit = 10 * time.Millisecond
	if _, err := e.Holders(t.Context(), all); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a page that does not come: %v, want that its time is over", err)
	}
}

func TestWhatAnErrorSays(t *testing.T) {
	s := ec2test.New(t)
	s.Add("eni-1", 1, "10.0.0.1")
	e, ip := open(t, s.URL), []netip.Addr{netip.MustParseAddr("10.0.0.50")}
	for name, tt := range map[string]struct {
		fault ec2test.Fault
		is    error // nil: it may be done
		says  string
	}{
		"throttled":          {ec2test.Fault{Throttle: true}, cloud.ErrThrottled, "RequestLimitExceeded"},
		"refused":            {ec2test.Fault{Code: "UnauthorizedOperation"}, cloud.ErrRefused, "docs/aws.md has the IAM policy"},
		"the answer is lost": {ec2test.Fault{Lose: true}, nil, "AssignPrivateIpAddresses"},
	} {
		t.Run(name, func(t *testing.T) {
			s.Fault(func(ec2test.Call) ec2test.Fault { return tt.fault })
			err := e.Assign(t.Context(), "eni-1", ip, false)
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("error %v, want one that says %q", err, tt.says)
			}
			for _, is := range []error{cloud.ErrThrottled, cloud.ErrRefused} {
				if errors.Is(err, is) != (tt.is == is) {
					t.Errorf("error %v is %v: %t", err, is, errors.Is(err, is))
				}
			}
		})
	}
}

// An answer that is none of EC2's, as of a proxy on the way, is no yes.
func TestAnAnswerOfSomebodyElseIsNoYes(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"a page": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte("<html><body>hello</body></html>"))
		},
		"nothing":       func(http.ResponseWriter, *http.Request) {},
		"a bad gateway": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) },
		"an answer of no": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte("<AssignPrivateIpAddressesResponse><return>false</return></AssignPrivateIpAddressesResponse>"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(h)
			defer s.Close()
			err := open(t, s.URL).Assign(t.Context(), "eni-1", []netip.Addr{netip.MustParseAddr("10.0.0.50")}, false)
			if err == nil || errors.Is(err, cloud.ErrRefused) || errors.Is(err, cloud.ErrThrottled) {
				t.Errorf("error %v, want one that leaves open whether it is done", err)
			}
		})
	}
}

func TestNothingIsSentAfterItsTime(t *testing.T) {
	s := ec2test.New(t)
	s.Add("eni-1", 1, "10.0.0.1")
	e := open(t, s.URL)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := e.Assign(ctx, "eni-1", []netip.Addr{netip.MustParseAddr("10.0.0.50")}, false)
	if !errors.Is(err, cloud.ErrNotSent) || errors.Is(err, cloud.ErrRefused) {
		t.Errorf("error %v, want ErrNotSent", err)
	}
	if calls := s.Calls(); len(calls) > 0 {
		t.Errorf("%+v", calls)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	s := ec2test.New(t)
	s.Add("eni-1", 1, "10.0.0.1")
	from := httptest.NewServer(http.RedirectHandler(s.URL, http.StatusTemporaryRedirect))
	defer from.Close()
	if err := open(t, from.URL).Assign(t.Context(), "eni-1", []netip.Addr{netip.MustParseAddr("10.0.0.50")}, false); err == nil {
		t.Error("a redirect is taken for a yes")
	}
	if calls := s.Calls(); len(calls) > 0 {
		t.Errorf("%+v", calls)
	}
}

func TestWithoutAnInstanceRegionAndVPCHaveToBeGiven(t *testing.T) {
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_REGION", "")
	t.Setenv("AWS_DEFAULT_REGION", "")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for want, cfg := range map[string]Config{"--region": {VPC: "vpc-1"}, "--vpc": {Region: "eu-central-1"}} {
		if _, err := New(ctx, cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one that names %s", err, want)
		}
	}
}

// The image has no file of CAs. A process reads those of the system once, so another one looks for them where none are.
func TestWithoutCAsOfTheSystemThoseOfTheProgramAreTrusted(t *testing.T) {
	const child = "EGRET_TEST_WITHOUT_CAS"
	if os.Getenv(child) == "" {
		c := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.count=1")
		c.Env = append(os.Environ(), child+"=1", "SSL_CERT_FILE=/none", "SSL_CERT_DIR=/none")
		if out, err := c.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	open(t, "https://ec2.example")
	n := 0
	for root := range bundle.Roots() {
		c, err := x509.ParseCertificate(root.Certificate)
		if err != nil {
			t.Fatal(err)
		}
		if now := time.Now(); root.Constraint != nil || now.Before(c.NotBefore) || now.After(c.NotAfter) {
			continue
		}
		n++
		if _, err := c.Verify(x509.VerifyOptions{}); err != nil {
			t.Errorf("%v: %v", c.Subject, err)
		}
	}
	if n == 0 {
		t.Error("no CA was tried")
	}
}

func TestAnEndpointOfAnOwnCAIsTrustedByAWS_CA_BUNDLE(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("<AssignPrivateIpAddressesResponse><return>true</return></AssignPrivateIpAddressesResponse>"))
	}))
	defer s.Close()
	assign := func() error {
		return open(t, s.URL).Assign(t.Context(), "eni-1", []netip.Addr{netip.MustParseAddr("10.0.0.50")}, false)
	}
	if err := assign(); !errors.As(err, new(x509.UnknownAuthorityError)) {
		t.Errorf("error %v, want that nobody knows the CA", err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_CA_BUNDLE", file)
	if err := assign(); err != nil {
		t.Error(err)
	}
}

// Package alerts makes alerts fire by the faults that they are for: a Prometheus scrapes a lab, over TLS where it comes
// from elsewhere, evaluates manifests/monitoring/rules.yaml, and the lab is broken (faults_test.go says how, alert by
// alert). It takes three minutes, most of which are waiting.
package alerts

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/crdsync/admission"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

const (
	metricsPort    = 8491 // at all addresses of a node, beside 127.0.0.1:8481
	prometheusPort = 9090
)

func TestMain(m *testing.M) {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

// site is a lab with a Prometheus on its control host.
type site struct {
	*testing.T
	lab  *lab.Lab
	logs string // the directory of the agents' logs of connections

	died string // the node whose agent was killed last
	full func() // ends that etcd is full

	exprs  map[string]string    // of the rules, by alert
	causes map[string]time.Time // by alert, when what it is for happened, where that was before its turn
	// what happened before is not the fault of the alert whose turn it is; zero: nothing that would make it fire did
	since time.Time
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// certificate writes one for the name egret, which is its own CA, for the agents and for Prometheus.
func certificate(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	form := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "egret"}, DNSNames: []string{"egret"}, NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, form, form, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	b, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write(t, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	write(t, key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: b}))
	return cert, key
}

func start(t *testing.T) *site {
	t.Helper()
	dir := t.TempDir()
	cert, key := certificate(t, dir)
	logs := filepath.Join(dir, "nat-log") // a file system of its own, which can be full
	if err := errors.Join(os.Mkdir(logs, 0o700), syscall.Mount("tmpfs", logs, "tmpfs", 0, "size=256k")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(logs, 0); err != nil {
			t.Errorf("unmounting %s: %v", logs, err)
		}
	})
	l, err := lab.Up(t.Context(), lab.Config{
		Name: lab.OwnName("alerts"), LeaseTTL: 3 * time.Second, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		AgentFlags: []string{fmt.Sprintf("--metrics-address=0.0.0.0:%d", metricsPort), "--metrics-cert-file", cert, "--metrics-key-file", key, "--metrics-client-ca-file", cert,
			"--nat-log", filepath.Join(logs, "nat.log")},
		SyncFlags: []string{"--block-size=32768"}, // three nodes have nine of ten ports of an IP
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	// The rules as they are, but for how long something has to last before an alert fires.
	rules, err := os.ReadFile("../../manifests/monitoring/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "rules.yaml"), regexp.MustCompile(`(?m)^    for: .*$`).ReplaceAll(rules, []byte("    for: 1s")))
	var targets []string
	for n := range 3 {
		targets = append(targets, fmt.Sprintf("{targets: ['10.10.0.%d:%d'], labels: {instance: node-%d}}", 101+n, metricsPort, n+1))
	}
	write(t, filepath.Join(dir, "prometheus.yaml"), fmt.Appendf(nil, `
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: [rules.yaml]
scrape_configs:
- job_name: egret-agent
  scheme: https
  tls_config: {ca_file: %s, cert_file: %[1]s, key_file: %s, server_name: egret}
  static_configs: [%s]
- job_name: egret-crdsync
  static_configs: [{targets: ['127.0.0.1:%d']}]
`, cert, key, strings.Join(targets, ", "), egress.SyncStatusPort))
	var log bytes.Buffer
	c := exec.Command("prometheus", "--config.file", filepath.Join(dir, "prometheus.yaml"), "--storage.tsdb.path", filepath.Join(dir, "data"),
		"--web.listen-address", fmt.Sprintf("127.0.0.1:%d", prometheusPort), "--log.level=warn")
	c.Stdout, c.Stderr = &log, &log
	if err := l.In("control", "", c.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Signal(syscall.SIGTERM) // it may have ended
		if err := c.Wait(); err != nil || t.Failed() {
			t.Logf("prometheus: %v\n%s", err, log.String())
		}
	})
	return &site{T: t, lab: l, logs: logs, exprs: expressions(t, rules), causes: map[string]time.Time{}}
}

// expressions returns those of the rules, by alert.
func expressions(t *testing.T, rules []byte) map[string]string {
	t.Helper()
	var file struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	if err := yaml.Unmarshal(rules, &file); err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			out[r.Alert] = r.Expr
		}
	}
	return out
}

// lookingBack returns an expression whose windows are no longer than that.
func lookingBack(expr string, most time.Duration) string {
	return regexp.MustCompile(`\[(\d+m)\]`).ReplaceAllStringFunc(expr, func(window string) string {
		long, err := time.ParseDuration(strings.Trim(window, "[]"))
		if err != nil || long <= most {
			return window
		}
		return fmt.Sprintf("[%ds]", int(most.Seconds())+1)
	})
}

// ask asks Prometheus.
func (s *site) ask(path string, answer any) error {
	return s.lab.In("control", "", func() error {
		// here: another goroutine would dial elsewhere
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", prometheusPort))
		if err != nil {
			return err
		}
		client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
			DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}
		r, err := client.Get("http://127.0.0.1" + path)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		return json.Unmarshal(b, answer)
	})
}

// labels returns a label of all series of an expression, sorted.
func (s *site) labels(expr, label string) (out []string) {
	s.Helper()
	var answer struct {
		Data struct {
			Result []struct{ Metric map[string]string }
		}
	}
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		err := s.ask("/api/v1/query?query="+url.QueryEscape(expr), &answer)
		if err == nil {
			break
		}
		if time.Now().After(until) {
			s.Fatalf("%s: %v", expr, err)
		}
	}
	for _, r := range answer.Data.Result {
		out = append(out, r.Metric[label])
	}
	slices.Sort(out)
	return out
}

// until waits until a label of an expression's series is as it is to be.
func (s *site) until(what string, limit time.Duration, expr, label string, is func([]string) bool) (now []string) {
	s.Helper()
	for until := time.Now().Add(limit); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		if now = s.labels(expr, label); is(now) {
			return now
		}
	}
	s.Fatalf("%s: not within %v; %s of %s: %q", what, limit, label, expr, now)
	return nil
}

// holder returns the node that holds the IP of the egress web, another one than not, as soon as there is one.
func (s *site) holder(not string) string {
	s.Helper()
	return s.until("web's IP is held, not by "+not, time.Minute, `egret_egress_info{egress="web"}`, "node", func(now []string) bool {
		return len(now) == 1 && now[0] != "" && now[0] != not
	})[0]
}

// inWords is how an alert is told here.
func inWords(name string, labels map[string]string) string {
	return fmt.Sprint(name, " ", labels["instance"], " ", labels["egress_ip"], labels["pool"], labels["part"], labels["reason"])
}

// firing returns the alerts that fire, by name, with their labels in words.
func (s *site) firing() (out []string, err error) {
	var answer struct {
		Data struct {
			Alerts []struct {
				State  string
				Labels map[string]string
			}
		}
	}
	err = s.ask("/api/v1/alerts", &answer)
	for _, a := range answer.Data.Alerts {
		if a.State == "firing" {
			out = append(out, inWords(a.Labels["alertname"], a.Labels))
		}
	}
	slices.Sort(out)
	return out, err
}

func (s *site) eventually(what string, limit time.Duration, f func([]string) bool) {
	s.Helper()
	var now []string
	var err error
	for until := time.Now().Add(limit); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		if now, err = s.firing(); err == nil && f(now) {
			return
		}
	}
	s.Errorf("%s: after %v these fire: %q, %v", what, limit, now, err)
}

// scraped waits until all targets have been scraped after it was called.
func (s *site) scraped() {
	s.Helper()
	now := time.Now()
	old := fmt.Sprintf("timestamp(up) < %d.%03d or up == 0", now.Unix(), now.UnixMilli()%1000)
	s.until("all are scraped", 30*time.Second, old, "instance", func(old []string) bool { return len(old) == 0 })
}

// mark has what happened until now left out of what an alert looks back at (made), and waits for a scrape of each target
// from which to count.
func (s *site) mark() {
	s.Helper()
	now := time.Now()
	s.scraped()
	s.since = now
}

// made reports whether alerts that begin so fire, and would by what happened since alone: on a busy machine etcd and
// permits are late before anybody stalls them, and a take-over is the fault of several alerts.
func (s *site) made(alert string) bool {
	s.Helper()
	begins := func(a string) bool { return strings.HasPrefix(a, alert) }
	if now, err := s.firing(); err != nil || !slices.ContainsFunc(now, begins) || s.since.IsZero() {
		return err == nil && slices.ContainsFunc(now, begins)
	}
	name, _, _ := strings.Cut(alert, " ")
	var answer struct {
		Data struct {
			Result []struct{ Metric map[string]string }
		}
	}
	err := s.ask("/api/v1/query?query="+url.QueryEscape(lookingBack(s.exprs[name], time.Since(s.since))), &answer)
	for _, r := range answer.Data.Result {
		if err == nil && begins(inWords(name, r.Metric)) {
			return true
		}
	}
	return false
}

// fires breaks something, waits for an alert that begins so, mends it, and waits until that is over, unless the alert
// looks back for minutes.
func (s *site) fires(f fault) {
	s.Helper()
	if name, ok := strings.CutSuffix(f.alert, holder); ok {
		f.alert = name + s.holder("")
	}
	is := func(now []string) bool {
		return slices.ContainsFunc(now, func(a string) bool { return strings.HasPrefix(a, f.alert) })
	}
	name, _, _ := strings.Cut(f.alert, " ")
	s.since = s.causes[name]
	if !f.looksBack {
		s.eventually(f.alert+" before its fault", 90*time.Second, func(now []string) bool { return !is(now) })
	} else if now, err := s.firing(); err == nil && is(now) && s.since.IsZero() {
		// What was broken before is in its window, too, which would take minutes to pass.
		s.Logf("%s fires before its fault, and has to by what happens from now on alone: %q", f.alert, now)
		s.mark()
	}
	began := time.Now()
	f.breaks()
	s.eventually(f.alert, 2*time.Minute, func([]string) bool { return s.made(f.alert) })
	took := time.Since(began)
	if f.mends == nil {
		s.Logf("%s fires %v after its fault", f.alert, took.Round(100*time.Millisecond))
		return
	}
	f.mends()
	if f.looksBack {
		s.Logf("%s fires %v after its fault", f.alert, took.Round(100*time.Millisecond))
		return
	}
	began = time.Now()
	s.eventually(f.alert+" is mended", 90*time.Second, func(now []string) bool { return !is(now) })
	s.Logf("%s fires %v after its fault, and is over %v after it was mended", f.alert, took.Round(100*time.Millisecond), time.Since(began).Round(100*time.Millisecond))
}

func (s *site) must(out []byte, err error) {
	s.Helper()
	if err != nil {
		s.Fatalf("%v\n%s", err, out)
	}
}

// kubectl runs it, again where the API server of a busy machine was too slow for it.
func (s *site) kubectl(args ...string) func() {
	return func() {
		s.Helper()
		for until := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) {
			out, err := s.lab.Kubectl(s.Context(), args...)
			slow := err != nil && regexp.MustCompile("connection lost|timeout|timed out|deadline exceeded").MatchString(err.Error()+string(out))
			if !slow || time.Now().After(until) {
				s.must(out, err)
				return
			}
		}
	}
}

func (s *site) in(kind, name, line string) func() {
	return func() { s.Helper(); s.must(s.lab.Exec(s.Context(), kind, name, strings.Fields(line)...)) }
}

// review sends something to the webhook.
func (s *site) review(what string) func() {
	return func() {
		s.Helper()
		s.must(nil, s.lab.In("control", "", func() error {
			// whose certificate it is the API server knows
			c, err := tls.Dial("tcp", "127.0.0.1:9443", &tls.Config{InsecureSkipVerify: true})
			if err != nil {
				return err
			}
			client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
				DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}
			r, err := client.Post("https://127.0.0.1"+admission.Path, "application/json", strings.NewReader(what))
			if err != nil {
				return err
			}
			return r.Body.Close()
		}))
	}
}

// open opens a connection from a pod to the outside.
func (s *site) open(pod string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(s.Context(), limit)
	defer cancel()
	_, err := s.lab.Source(ctx, pod)
	return err
}

func (s *site) apply(object string) {
	s.Helper()
	path := filepath.Join(s.TempDir(), "object.yaml")
	write(s.T, path, []byte(object))
	s.kubectl("apply", "-f", path)()
}

// pool makes a pool of addresses, and an egress of it for pods with the label app=<name>.
func (s *site) pool(name, first, last string) {
	s.Helper()
	s.apply(fmt.Sprintf(`
apiVersion: crd.antrea.io/v1beta1
kind: ExternalIPPool
metadata: {name: %s}
spec: {ipRanges: [{start: %s, end: %s}], nodeSelector: {}}
`, name, first, last))
	s.egress(name, name)
}

func (s *site) egress(name, pool string) {
	s.Helper()
	s.apply(fmt.Sprintf(`
apiVersion: crd.antrea.io/v1beta1
kind: Egress
metadata: {name: %s}
spec: {externalIPPool: %s, appliedTo: {podSelector: {matchLabels: {app: %[1]s}}}}
`, name, pool))
}

func TestAlertsFireByTheFaultsThatTheyAreFor(t *testing.T) {
	s := start(t)
	s.pool("web", "10.10.0.11", "10.10.0.11")
	s.pod("prod/web-1", "node-1")
	s.holder("")
	s.eventually("a cluster in which all is well", 90*time.Second, func(now []string) bool { return len(now) == 0 })
	for _, f := range s.faults() {
		if s.fires(f); s.Failed() {
			break // the next one would be of two faults
		}
	}
	if s.full != nil {
		s.full()
	}
}

// TestEachAlertHasItsFault needs no lab.
func TestEachAlertHasItsFault(t *testing.T) {
	var file struct {
		Groups []struct{ Rules []struct{ Alert string } }
	}
	rules, err := os.ReadFile("../../manifests/monitoring/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(rules, &file); err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, f := range (&site{T: t}).faults() {
		name, _, _ := strings.Cut(f.alert, " ")
		known[name] = true
	}
	n := 0
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if n++; !known[r.Alert] {
				t.Errorf("%s: no fault makes it fire", r.Alert)
			}
			delete(known, r.Alert)
		}
	}
	if n < 20 || len(known) > 0 {
		t.Errorf("%d alerts; these are none, or are there twice: %v", n, known)
	}
}

func TestAnAlertLooksBackNoFurtherThanToItsFault(t *testing.T) {
	for expr, want := range map[string]string{
		"a > 1":                            "a > 1",
		"increase(a[5m]) > 0":              "increase(a[31s]) > 0",
		"rate(a[5m]) / rate(b[5m]) > 0.01": "rate(a[31s]) / rate(b[31s]) > 0.01",
		`sum(increase(a{cause=~"x|y"}[30m])) > 3 * sum(b)`: `sum(increase(a{cause=~"x|y"}[31s])) > 3 * sum(b)`,
	} {
		if got := lookingBack(expr, 30*time.Second); got != want {
			t.Errorf("%s: %s, want %s", expr, got, want)
		}
		if got := lookingBack(expr, time.Hour); got != expr {
			t.Errorf("%s: after an hour %s", expr, got)
		}
	}
	rules, err := os.ReadFile("../../manifests/monitoring/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	all := expressions(t, rules)
	for _, f := range (&site{T: t}).faults() {
		name, _, _ := strings.Cut(f.alert, " ")
		// whose ports are in use for half a minute
		if back := lookingBack(all[name], time.Second) != all[name]; back != f.looksBack && name != "EgretPortsNearlyUsed" {
			t.Errorf("%s: %s looks back: %v, and the test says %v", name, all[name], back, f.looksBack)
		}
	}
}

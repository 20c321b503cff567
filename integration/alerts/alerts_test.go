// Package alerts makes alerts fire by the faults that they are for: a Prometheus scrapes a lab, over TLS where it comes from elsewhere, evaluates
// manifests/monitoring/rules.yaml, and the lab is broken. It takes two minutes, and is not part of CI: `make test-alerts`.
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
	return &site{t, l, logs}
}

// ask asks Prometheus.
func (s *site) ask(path string, answer any) error {
	return s.lab.In("control", "", func() error {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", prometheusPort)) // here: another goroutine would dial elsewhere
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

// value returns the largest value of an expression.
func (s *site) value(expr string) string {
	s.Helper()
	var answer struct {
		Data struct{ Result []struct{ Value [2]any } }
	}
	if err := s.ask("/api/v1/query?query="+url.QueryEscape("max("+expr+")"), &answer); err != nil || len(answer.Data.Result) != 1 {
		s.Fatalf("%s: %v, %v", expr, answer, err)
	}
	return fmt.Sprint(answer.Data.Result[0].Value[1])
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
			out = append(out, fmt.Sprint(a.Labels["alertname"], " ", a.Labels["instance"], " ", a.Labels["egress_ip"], a.Labels["pool"], a.Labels["part"], a.Labels["reason"]))
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

// fires breaks something, waits for an alert that begins so, mends it, and waits until that is over; where mend is nil, it does not wait for that.
func (s *site) fires(alert string, fault, mend func()) {
	s.Helper()
	is := func(now []string) bool {
		return slices.ContainsFunc(now, func(a string) bool { return strings.HasPrefix(a, alert) })
	}
	s.eventually(alert+" before its fault", 60*time.Second, func(now []string) bool { return !is(now) })
	began := time.Now()
	fault()
	s.eventually(alert, 40*time.Second, is)
	took := time.Since(began)
	if mend == nil {
		s.Logf("%s fires %v after its fault", alert, took.Round(100*time.Millisecond))
		return
	}
	mend()
	began = time.Now()
	s.eventually(alert+" is mended", 60*time.Second, func(now []string) bool { return !is(now) })
	s.Logf("%s fires %v after its fault, and is over %v after it was mended", alert, took.Round(100*time.Millisecond), time.Since(began).Round(100*time.Millisecond))
}

func (s *site) must(out []byte, err error) {
	s.Helper()
	if err != nil {
		s.Fatalf("%v\n%s", err, out)
	}
}

func (s *site) kubectl(args ...string) func() {
	return func() { s.Helper(); s.must(s.lab.Kubectl(s.Context(), args...)) }
}

func (s *site) in(kind, name, line string) func() {
	return func() { s.Helper(); s.must(s.lab.Exec(s.Context(), kind, name, strings.Fields(line)...)) }
}

// review sends something to the webhook.
func (s *site) review(what string) func() {
	return func() {
		s.Helper()
		s.must(nil, s.lab.In("control", "", func() error {
			c, err := tls.Dial("tcp", "127.0.0.1:9443", &tls.Config{InsecureSkipVerify: true}) // whose certificate it is the API server knows
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
	do := func(f func(context.Context, string, string) error, what, node string) func() {
		return func() {
			t.Helper()
			if err := f(t.Context(), what, node); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.pool("web", "10.10.0.11", "10.10.0.11")
	if _, err := s.lab.Pod(t.Context(), lab.PodConfig{Name: "prod/web-1", Node: "node-1", Labels: map[string]string{"app": "web"}}); err != nil {
		t.Fatal(err)
	}
	s.eventually("a cluster in which all is well", 60*time.Second, func(now []string) bool { return len(now) == 0 })

	time.Sleep(20 * time.Second) // what rest costs, with a scrape a second
	s.Logf("an agent at rest: %s of a processor, %s bytes resident", s.value(`rate(process_cpu_seconds_total{job="egret-agent"}[15s])`), s.value(`process_resident_memory_bytes{job="egret-agent"}`))

	s.fires("EgretEgressIPHeldByNobody 127.0.0.1:8482 10.10.0.11", s.kubectl("patch", "externalippool", "web", "--type", "merge", "-p", `{"spec":{"nodeSelector":{"matchLabels":{"no":"node"}}}}`),
		s.kubectl("patch", "externalippool", "web", "--type", "json", "-p", `[{"op":"replace","path":"/spec/nodeSelector","value":{}}]`))
	s.fires("EgretNotAllocated", func() { s.egress("lost", "nowhere") }, s.kubectl("delete", "egress", "lost"))
	s.fires("EgretPoolNearlyFull", func() { s.pool("two", "10.10.0.13", "10.10.0.14"); s.egress("second", "two") }, s.kubectl("delete", "egress", "second", "two"))
	s.fires("EgretAddressInUse", func() {
		s.in("outside", "", "ip addr add 10.10.0.15/24 dev eth0")()
		s.pool("used", "10.10.0.15", "10.10.0.15")
	}, func() {
		s.in("outside", "", "ip addr del 10.10.0.15/24 dev eth0")()
		s.kubectl("delete", "egress", "used")()
	})
	s.fires("EgretForgedPackets node-2 overlay_foreign", s.in("outside", "", "bash -c echo>/dev/udp/10.10.0.102/8479"), nil)
	s.fires("EgretPacketsDropped node-1 10.10.0.11", func() {
		s.in("node", "node-1", "nft add table ip other")()
		s.in("node", "node-1", "nft add chain ip other post { type nat hook postrouting priority -199 ; }")()
		s.in("node", "node-1", "nft insert rule ip other post ip saddr 10.244.0.0/16 snat to 10.10.0.101")()
		for range 20 { // connections that do not come through
			_ = s.open("prod/web-1", time.Second)
		}
	}, s.in("node", "node-1", "nft delete table ip other"))
	s.fires("EgretDegraded node-3 node", s.kubectl("delete", "node", "node-3"), func() { s.must(nil, s.lab.RegisterNode(t.Context(), "node-3")) })
	s.fires("EgretAgentMissing", do(s.lab.Kill, "agent", "node-2"), do(s.lab.Start, "agent", "node-2"))
	s.fires("EgretGossipPartitioned node-3", do(func(ctx context.Context, node, what string) error { return s.lab.Cut(ctx, node, what) }, "node-3", "peers"),
		do(func(ctx context.Context, node, what string) error { return s.lab.Heal(ctx, node, what) }, "node-3", "peers"))
	s.fires("EgretNoLeader", do(s.lab.Stop, "crdsync", ""), do(s.lab.Start, "crdsync", ""))
	s.fires("EgretWebhookFails 127.0.0.1:8482", s.review("no review"), nil)
	s.fires("EgretNATLogIncomplete node-1 write", func() {
		if err := os.WriteFile(filepath.Join(s.logs, "other"), make([]byte, 256<<10), 0o600); !errors.Is(err, syscall.ENOSPC) {
			s.Fatalf("filling the file system of the logs: %v, want that it is full", err)
		}
		for range 50 { // the log's last page has room for some lines
			s.must(nil, s.open("prod/web-1", 5*time.Second))
		}
	}, nil)
	s.fires("EgretEtcdLost", do(s.lab.Stop, "etcd", ""), do(s.lab.Start, "etcd", ""))
}

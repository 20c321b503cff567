package kubelet

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

// What metrics.enabled=true of the chart gives, by the Secret egret-metrics-reader, as docs/install.md says.

// reader returns what Prometheus is given: the CA that it goes by, and the certificate that it shows.
func (c *cluster) reader() (ca *x509.CertPool, shown tls.Certificate) {
	c.t.Helper()
	var data map[string]string
	if err := json.Unmarshal([]byte(c.kubectl("-n", "egret-system", "get", "secret", "egret-metrics-reader", "-o", "jsonpath={.data}")), &data); err != nil {
		c.t.Fatal(err)
	}
	of := func(key string) []byte {
		b, err := base64.StdEncoding.DecodeString(data[key])
		if err != nil {
			c.t.Fatalf("%s of the Secret: %v", key, err)
		}
		return b
	}
	ca = x509.NewCertPool()
	shown, err := tls.X509KeyPair(of("tls.crt"), of("tls.key"))
	if err != nil || !ca.AppendCertsFromPEM(of("ca.crt")) {
		c.t.Fatalf("the Secret egret-metrics-reader has no CA and certificate: %v", err)
	}
	return ca, shown
}

// scrape asks for metrics from a pod of the cluster, as Prometheus is one.
func (c *cluster) scrape(from pod, address netip.AddrPort, cfg *tls.Config) (string, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
	defer cancel()
	transport := &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true, DialContext: func(context.Context, string, string) (conn net.Conn, err error) {
		in := c.lab.In("pod", from.name, func() error {
			conn, err = net.DialTimeout("tcp", address.String(), 5*time.Second)
			return err
		})
		return conn, in
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address.String()+"/metrics", nil)
	if err != nil {
		return "", err
	}
	answer, err := transport.RoundTrip(r)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", answer.Status, b)
	}
	return string(b), err
}

func measured(t *testing.T, c *cluster) {
	ca, shown := c.reader()
	as := func(server string, shown ...tls.Certificate) *tls.Config {
		return &tls.Config{RootCAs: ca, ServerName: server + ".egret-system.svc", Certificates: shown}
	}
	ip, gateway := c.gateway("egress-prod-web")
	pods := c.webs()["egress-prod-web"]
	c.leaves(pods, ip, 10*time.Second) // something passes
	from := c.pods("prod", "db")[0]
	sent := regexp.MustCompile(`(?m)^egret_egress_sent_packets_total\{egress_ip="` + regexp.QuoteMeta(ip.String()) + `"\} (\S+)$`)
	for _, node := range nodes() {
		at := netip.AddrPortFrom(c.nodeIP(node), egress.StatusPort)
		text, err := c.scrape(from, at, as("egret-agent", shown))
		if err != nil || !strings.Contains(text, "egret_etcd_watch_up 1\n") {
			t.Errorf("the agent of %s, asked with the reader's certificate: %v\n%.300s", node, err, text)
		}
		if m := sent.FindStringSubmatch(text); node == gateway {
			if n, err := strconv.ParseFloat(strings.Join(m[min(1, len(m)):], ""), 64); err != nil || n < float64(len(pods)) {
				t.Errorf("the gateway %s says that %v sent %q packets, %v: want %d at least", node, ip, m, err, len(pods))
			}
		}
		for what, cfg := range map[string]*tls.Config{"without a certificate": as("egret-agent"), "as crdsync": as("egret-crdsync", shown)} {
			if text, err := c.scrape(from, at, cfg); err == nil {
				t.Errorf("the agent of %s, asked %s, answers:\n%.300s", node, what, text)
			}
		}
	}
	leaders := 0
	for _, host := range strings.Fields(c.kubectl("-n", "egret-system", "get", "pods", "-l", "app.kubernetes.io/name=egret-crdsync", "-o", "jsonpath={.items[*].status.hostIP}")) {
		text, err := c.scrape(from, netip.AddrPortFrom(netip.MustParseAddr(host), egress.SyncStatusPort), as("egret-crdsync", shown))
		if err != nil {
			t.Errorf("crdsync at %s, asked with the reader's certificate: %v", host, err)
		}
		leaders += strings.Count(text, "\negret_crdsync_leader 1\n")
	}
	if leaders != 1 {
		t.Errorf("%d replicas of crdsync say that they lead, want one", leaders)
	}
	c.seenOnThePage(pods, ip)
}

// seenOnThePage looks at the status page by a port-forward, as docs/security.md says, and waits until its count of what
// an egress IP sent grows with what pods send.
func (c *cluster) seenOnThePage(pods []pod, ip netip.Addr) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	forward, err := c.lab.KubectlCommand(ctx, "-n", "egret-system", "port-forward", "deployment/egret-crdsync", ":8487")
	if err != nil {
		c.t.Fatal(err)
	}
	out, err := forward.StdoutPipe()
	if err == nil {
		err = forward.Start()
	}
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { cancel(); _ = forward.Wait() }() // it was told to end
	line, err := bufio.NewReader(out).ReadString('\n')
	at, _, ok := strings.Cut(strings.TrimPrefix(line, "Forwarding from "), " -> ")
	if !ok {
		c.t.Fatalf("kubectl port-forward says %q, %v", line, err)
	}
	count := func() (uint64, string) {
		r, err := http.Get("http://" + at + "/traffic?ips=" + ip.String())
		if err != nil {
			return 0, err.Error()
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		var rows map[netip.Addr]egress.Traffic
		if err == nil {
			err = json.Unmarshal(b, &rows)
		}
		return rows[ip].SentPackets, fmt.Sprintf("%v: %s, %v", r.Status, b, err)
	}
	var before uint64
	c.until(30*time.Second, "the page's count of what "+ip.String()+" sent", func() (bool, string) {
		n, have := count()
		before = n
		return n > 0, have
	})
	c.leaves(pods, ip, 10*time.Second)
	c.until(30*time.Second, fmt.Sprintf("more than %d packets on the page", before), func() (bool, string) {
		n, have := count()
		return n > before, have
	})
}

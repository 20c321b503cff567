package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/egret-project/egret/crdsync/credentials"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/internal/port"
)

const patience = time.Minute

func init() { pause, lookEvery = 50*time.Millisecond, 200*time.Millisecond }

// installation is a cluster of three members with the certificates that `egret credentials` makes, in the folders that
// pods see.
type installation struct {
	*testing.T
	dir     string
	host    netip.Addr // of this machine, where all members are
	creds   credentials.Config
	clients []int // ports
	peers   []int
	status  []int
	stops   []func()
}

func newInstallation(t *testing.T, host netip.Addr) *installation {
	t.Helper()
	i := newMembers(t, host)
	kube, err := kubernetes.NewForConfig(kubetest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	i.creds.Kube = kube
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: i.creds.Namespace}}
	if _, err := kube.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	i.project()
	return i
}

// newMembers returns an installation that has no certificates yet.
func newMembers(t *testing.T, host netip.Addr) *installation {
	i := &installation{T: t, dir: t.TempDir(), host: host, stops: make([]func(), 3), creds: credentials.Config{Etcd: true,
		Namespace: "egret-system", Service: "egret-etcd", Peers: "egret-etcd-peers", Log: slog.New(slog.DiscardHandler),
	}}
	for range 3 {
		i.clients, i.peers, i.status = append(i.clients, port.Hold(t)), append(i.peers, port.Hold(t)), append(i.status, port.Hold(t))
	}
	return i
}

// project does what credentials and the kubelet do: Secrets become files.
func (i *installation) project() {
	i.Helper()
	if err := credentials.Once(i.Context(), i.creds, time.Now()); err != nil {
		i.Fatal(err)
	}
	list, err := i.creds.Kube.CoreV1().Secrets(i.creds.Namespace).List(i.Context(), metav1.ListOptions{})
	if err != nil {
		i.Fatal(err)
	}
	for _, s := range list.Items {
		for name, b := range s.Data {
			file := filepath.Join(i.dir, s.Name, name)
			if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
				i.Fatal(err)
			}
			if err := os.WriteFile(file, b, 0o600); err != nil {
				i.Fatal(err)
			}
		}
	}
}

func (i *installation) data(n int) string {
	return filepath.Join(i.dir, "data", fmt.Sprint("node-", n), fmt.Sprint("egret-etcd-", n))
}

func (i *installation) endpoint(n int) string {
	return "https://" + i.at(i.clients[n])
}

// at returns an address of a member.
func (i *installation) at(port int) string {
	return netip.AddrPortFrom(i.host, uint16(port)).String()
}

// start starts members, and returns when a client of each is served.
func (i *installation) start(args ...string) {
	i.Helper()
	for n := range 3 {
		i.startOne(n, args...)
	}
	for n := range 3 {
		i.put(n, "served", fmt.Sprint(n))
	}
}

// startOne starts member n.
func (i *installation) startOne(n int, args ...string) {
	i.Helper()
	ctx, cancel := context.WithCancel(i.Context())
	ended := make(chan error, 1)
	go func() { ended <- i.run(ctx, n, args...) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			i.Errorf("member %d: %v", n, err)
		}
	})
	i.stops[n] = stop
	i.Cleanup(stop)
}

// run runs member n until ctx ends.
func (i *installation) run(ctx context.Context, n int, args ...string) error {
	var all []string
	for n := range 3 {
		all = append(all, fmt.Sprintf("egret-etcd-%d=https://%s", n, i.at(i.peers[n])))
	}
	c := root()
	c.SetArgs(append([]string{
		"run", "--name", fmt.Sprint("egret-etcd-", n), "--data-dir", i.data(n), "--initial-cluster", strings.Join(all, ","), "--host-ip", i.host.String(),
		"--listen-ip", i.host.String(), "--client-port", fmt.Sprint(i.clients[n]), "--peer-port", fmt.Sprint(i.peers[n]), "--status-port", fmt.Sprint(i.status[n]),
		"--certs", filepath.Join(i.dir, "egret-etcd-server"), "--root-certs", filepath.Join(i.dir, "egret-etcd-root"), "--quota-backend-bytes", "67108864",
	}, args...))
	return c.ExecuteContext(ctx)
}

func (i *installation) stop() {
	var wg sync.WaitGroup
	for _, stop := range i.stops {
		wg.Go(stop)
	}
	wg.Wait()
}

// as returns the configuration of a client that shows the certificate of a Secret.
func (i *installation) as(secret string) *tls.Config {
	i.Helper()
	ca, err := os.ReadFile(filepath.Join(i.dir, "egret-etcd-root", "ca.crt"))
	if err != nil {
		i.Fatal(err)
	}
	c := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: i.creds.ServerName()}
	c.RootCAs.AppendCertsFromPEM(ca)
	if secret == "" {
		return c
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(i.dir, secret, "tls.crt"), filepath.Join(i.dir, secret, "tls.key"))
	if err != nil {
		i.Fatal(err)
	}
	c.Certificates = []tls.Certificate{pair}
	return c
}

func (i *installation) client(n int) *clientv3.Client {
	i.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{i.endpoint(n)}, TLS: i.as("egret-etcd-root"), DialTimeout: patience, Logger: zap.NewNop()})
	if err != nil {
		i.Fatal(err)
	}
	return c
}

func (i *installation) put(n int, key, value string) {
	i.Helper()
	c := i.client(n)
	defer c.Close()
	ctx, cancel := context.WithTimeout(i.Context(), patience)
	defer cancel()
	for {
		_, err := c.Put(ctx, key, value)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			i.Fatalf("member %d does not serve: %v", n, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (i *installation) get(n int, key string) string {
	i.Helper()
	c := i.client(n)
	defer c.Close()
	r, err := c.Get(i.Context(), key)
	if err != nil {
		i.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

func TestMembersServeWhoShowsACertificateAndComeBackFromASnapshot(t *testing.T) {
	i := newInstallation(t, netip.MustParseAddr("127.0.0.1"))
	i.start()
	i.put(0, "kept", "1")
	if got := i.get(2, "kept"); got != "1" {
		t.Errorf("member 2 has %q", got)
	}
	i.servesNobodyElse()
	i.proves()
	i.isBounded()
	i.showsANewCertificateWithoutARestart()

	// A snapshot, and the way back, after which nothing of what came later is there.
	dir := filepath.Join(i.dir, "snapshots")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var file string
	// at the last, nobody is there
	for _, endpoints := range []string{i.endpoint(0), i.endpoint(2), "https://127.0.0.1:1," + i.endpoint(1)} {
		file = i.snapshot("--dir", dir, "--keep", "2", "--endpoints", endpoints)
	}
	if files, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(files) != 2 || files[1] != file {
		t.Errorf("snapshots are %v, %v: want the last two, %s the last", files, err, file)
	}
	i.put(1, "late", "1")
	i.stop()
	// Who has data begins with that, whatever is said.
	i.start("--restore-from", file)
	if got := i.get(0, "late"); got != "1" {
		t.Errorf("data that was there is gone: late is %q", got)
	}
	i.stop()
	if err := os.RemoveAll(filepath.Join(i.dir, "data")); err != nil {
		t.Fatal(err)
	}
	// One that ended in the middle of restoring leaves this.
	if err := os.MkdirAll(i.data(1)+".restoring/member", 0o700); err != nil {
		t.Fatal(err)
	}
	i.start("--restore-from", file)
	for n := range 3 {
		if kept, late := i.get(n, "kept"), i.get(n, "late"); kept != "1" || late != "" {
			t.Errorf("member %d: kept is %q, late is %q, want 1 and nothing", n, kept, late)
		}
	}
	i.put(2, "after", "1")
	i.stop()
	i.start()
	if got := i.get(0, "after"); got != "1" {
		t.Errorf("after another start, after is %q", got)
	}
}

// What a cluster without IPv4 has: members at IPv6 addresses, and the Service's address in a variable, without
// brackets.
func TestMembersAtIPv6AddressesServeAndGiveASnapshot(t *testing.T) {
	i := newInstallation(t, netip.IPv6Loopback())
	i.start()
	i.put(0, "kept", "1")
	r, err := i.client(1).MemberList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range r.Members {
		if len(m.ClientURLs) != 1 || !strings.HasPrefix(m.ClientURLs[0], "https://[::1]:") || !strings.HasPrefix(m.PeerURLs[0], "https://[::1]:") {
			t.Errorf("%s tells clients of %v, and members of %v", m.Name, m.ClientURLs, m.PeerURLs)
		}
	}
	dir := filepath.Join(i.dir, "snapshots")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// https://$(EGRET_ETCD_SERVICE_HOST):8483
	file := i.snapshot("--dir", dir, "--endpoints", fmt.Sprintf("https://%s:%d", i.host, i.clients[2]))
	i.stop()
	if err := os.RemoveAll(filepath.Join(i.dir, "data")); err != nil {
		t.Fatal(err)
	}
	i.start("--restore-from", file)
	if got := i.get(2, "kept"); got != "1" {
		t.Errorf("after the restore, kept is %q", got)
	}

	// A member whose data is lost gets it from the others.
	i.put(0, "kept", "2")
	i.stops[1]()
	if err := os.RemoveAll(i.data(1)); err != nil {
		t.Fatal(err)
	}
	i.startOne(1)
	i.put(1, "served", "1")
	if got := i.get(1, "kept"); got != "2" {
		t.Errorf("the member without data has %q", got)
	}
}

func TestAMemberOnTheNodeOfAnotherOneDoesNotBegin(t *testing.T) {
	node := t.TempDir()
	m := member{name: "a", dataDir: filepath.Join(node, "a"), initialCluster: "a=https://127.0.0.1:1,b=https://127.0.0.1:2"}
	begin := func() error { return m.begin(t.Context(), embed.NewConfig()) } // nobody listens there
	other := filepath.Join(node, "b")
	log := func(dir string) {
		t.Helper()
		file := filepath.Join(dir, "member", "wal", "0.wal")
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{other, filepath.Join(node, "snapshots", "x"), filepath.Join(node, "old-b")} {
		log(dir)
	}
	for _, m.restore = range []string{"", "/none"} {
		if err := begin(); err == nil || !strings.Contains(err.Error(), other) || !strings.Contains(err.Error(), m.dataDir) {
			t.Errorf("--restore-from %q: error %v: want one that names %s", m.restore, err, other)
		}
	}
	m.restore = ""
	if err := os.RemoveAll(other); err != nil {
		t.Fatal(err)
	}
	// What etcd left of a start in which it wrote no log is no data, of neither.
	for _, dir := range []string{other, m.dataDir} {
		if err := os.MkdirAll(filepath.Join(dir, "member", "snap"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := begin(); err != nil {
		t.Errorf("where no other member has been: %v", err)
	}
	if _, err := os.Stat(filepath.Join(m.dataDir, "member")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is no data is in its place: %v", err)
	}
	log(other)
	log(m.dataDir)
	if err := begin(); err != nil {
		t.Errorf("with data of its own: %v", err)
	}
}

func (i *installation) snapshot(args ...string) string {
	i.Helper()
	var out bytes.Buffer
	c := root()
	c.SetOut(&out)
	c.SetArgs(append([]string{"snapshot", "--certs", filepath.Join(i.dir, "egret-etcd-root"),
		"--etcd-server-name", i.creds.ServerName()}, args...))
	if err := c.ExecuteContext(i.Context()); err != nil {
		i.Fatal(err)
	}
	m := regexp.MustCompile(`^(\S+\.db): revision [1-9]\d*, [1-9]\d* keys`).FindStringSubmatch(out.String())
	if m == nil {
		i.Fatalf("egret-etcd snapshot says %q", out.String())
	}
	return m[1]
}

// proves checks that a snapshot is taken of who has the name that was asked for, and not the address that was dialed,
// alone.
func (i *installation) proves() {
	i.Helper()
	c := root()
	c.SetOut(io.Discard)
	c.SetArgs([]string{"snapshot", "--certs", filepath.Join(i.dir, "egret-etcd-root"), "--etcd-server-name", "another.svc", "--endpoints", i.endpoint(0), "--dir", i.TempDir()})
	if err := c.ExecuteContext(i.Context()); err == nil {
		i.Error("a snapshot was taken of a member that is not another.svc")
	}
}

// A client without a certificate, or with one of another CA, is no client; and a client is no member.
func (i *installation) servesNobodyElse() {
	i.Helper()
	talks := func(port int, cfg *tls.Config) error {
		c, err := tls.Dial("tcp", i.at(port), cfg)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience)) // never fails for a connection
		if _, err := io.WriteString(c, "GET /version HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return err
		}
		_, err = c.Read(make([]byte, 1)) // TLS 1.3 says here that it refused the certificate
		return err
	}
	for name, tt := range map[string]struct {
		port int
		cfg  *tls.Config
		ok   bool
	}{
		"a client at the clients' port":          {i.clients[0], i.as("egret-etcd-agent"), true},
		"nobody at the clients' port":            {i.clients[0], i.as(""), false},
		"a member at the members' port":          {i.peers[0], i.as("egret-etcd-server"), true},
		"an agent at the members' port":          {i.peers[0], i.as("egret-etcd-agent"), false},
		"the administrator at the members' port": {i.peers[0], i.as("egret-etcd-root"), false},
		"nobody at the members' port":            {i.peers[0], i.as(""), false},
	} {
		if err := talks(tt.port, tt.cfg); (err == nil) != tt.ok {
			i.Errorf("%s: error %v", name, err)
		}
	}
	// The gateway would speak in the member's name.
	h := &http.Client{Transport: &http.Transport{TLSClientConfig: i.as("egret-etcd-agent")}, Timeout: patience}
	r, err := h.Post(i.endpoint(0)+"/v3/kv/range", "application/json", strings.NewReader(`{"key": "a2VwdA=="}`))
	if err != nil {
		i.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusNotFound {
		i.Errorf("the gateway answers %s", r.Status)
	}
	// What a kubelet asks.
	for _, path := range []string{"/readyz", "/livez"} {
		r, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", i.status[0], path))
		if err != nil {
			i.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != http.StatusOK {
			i.Errorf("%s: %s", path, r.Status)
		}
	}
}

// isBounded fills etcd up to its quota.
func (i *installation) isBounded() {
	i.Helper()
	c := i.client(0)
	defer c.Close()
	s, err := c.Status(i.Context(), i.endpoint(0))
	if err != nil || s.DbSizeQuota != 67108864 {
		i.Fatalf("the quota is %d, %v: want 67108864", s.DbSizeQuota, err)
	}
	_, err = c.Put(i.Context(), "large", strings.Repeat("x", 4<<20))
	if err == nil || err == rpctypes.ErrNoSpace {
		i.Errorf("a value of 4 MB: %v", err)
	}
}

func (i *installation) showsANewCertificateWithoutARestart() {
	i.Helper()
	shown := func() string {
		c, err := tls.Dial("tcp", i.at(i.clients[0]), i.as("egret-etcd-agent"))
		if err != nil {
			i.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	before := shown()
	if err := i.creds.Kube.CoreV1().Secrets(i.creds.Namespace).Delete(i.Context(), "egret-etcd-server", metav1.DeleteOptions{}); err != nil {
		i.Fatal(err)
	}
	i.project()
	if after := shown(); after == before {
		i.Error("the member shows the certificate that was replaced")
	}
}

func TestFaultyConfigurationIsNamed(t *testing.T) {
	for name, tt := range map[string]struct{ args, want []string }{
		"nothing":        {[]string{"run"}, []string{"--host-ip", "--initial-cluster", "--name", "--certs", "ca.crt"}},
		"another name":   {[]string{"run", "--name", "a", "--initial-cluster", "b=https://10.0.0.1:8484"}, []string{`"a"`, "b=https://10.0.0.1:8484"}},
		"quota":          {[]string{"run", "--quota-backend-bytes", "5"}, []string{"--quota-backend-bytes 5"}},
		"snapshot":       {[]string{"snapshot", "--certs", "/none"}, []string{"--certs", "/none"}},
		"snapshots kept": {[]string{"snapshot", "--keep=-1"}, []string{"--keep -1"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := root()
			c.SetArgs(tt.args)
			c.SetOut(io.Discard)
			err := c.ExecuteContext(t.Context())
			for _, want := range tt.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v: want one that names %s", err, want)
				}
			}
		})
	}
}

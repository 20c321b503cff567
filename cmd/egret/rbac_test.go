package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/store"
)

// secured is an etcd that knows its clients by their certificates.
type secured struct {
	*testing.T
	dir string
	url string
}

func newSecured(t *testing.T, options ...func(*embed.Config)) secured {
	t.Helper()
	a, s := newAuthority(t), secured{T: t, dir: t.TempDir()}
	member, key := a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "member"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	for name, pair := range map[string]tls.Certificate{
		"member": {Certificate: [][]byte{member.Raw}, PrivateKey: key}, "root": a.pair(x509.ExtKeyUsageClientAuth, "root"),
		"agent": a.pair(x509.ExtKeyUsageClientAuth, "egret-agent"), "crdsync": a.pair(x509.ExtKeyUsageClientAuth, "egret-crdsync"),
		"operator": a.pair(x509.ExtKeyUsageClientAuth, "egret-operator"), "stranger": a.pair(x509.ExtKeyUsageClientAuth, "stranger"),
	} {
		if err := os.Mkdir(filepath.Join(s.dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		a.write(filepath.Join(s.dir, name), pair)
	}
	etcd := etcdtest.New(t, append(options, func(cfg *embed.Config) {
		cfg.ListenClientUrls[0].Scheme, cfg.AdvertiseClientUrls[0].Scheme = "unixs", "https"
		cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = filepath.Join(s.dir, "member", "tls.crt"), filepath.Join(s.dir, "member", "tls.key")
		cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = filepath.Join(s.dir, "member", "ca.crt"), true
	})...)
	s.url = "https://" + etcd.Endpoint()
	return s
}

// as returns the flags that show a certificate.
func (s secured) as(who string) []string {
	at := func(file string) string { return filepath.Join(s.dir, who, file) }
	return []string{"--endpoints", s.url, "--cacert", at("ca.crt"), "--cert", at("tls.crt"), "--key", at("tls.key")}
}

func (s secured) egret(who string, args ...string) (string, error) {
	var out bytes.Buffer
	c := root()
	c.SetArgs(append(args, s.as(who)...))
	c.SetOut(&out)
	err := c.ExecuteContext(s.Context())
	return out.String(), err
}

func (s secured) client(who string) *store.Client {
	s.Helper()
	f := etcdFlags{
		endpoints: []string{s.url}, cacert: filepath.Join(s.dir, who, "ca.crt"), cert: filepath.Join(s.dir, who, "tls.crt"), key: filepath.Join(s.dir, who, "tls.key"),
		dialTimeout: 10 * time.Second,
	}
	c, err := f.dial(s.Context(), quiet)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { c.Close() })
	return c
}

func TestEtcdHoldsEachCertificateToItsPart(t *testing.T) {
	s := newSecured(t)
	// Printed, nothing is changed.
	for range 2 {
		out, err := s.egret("root", "etcd-rbac")
		if err != nil || !strings.Contains(out, "etcdctl role add egret-agent\n") || !strings.Contains(out, "any client may write everything") {
			t.Fatalf("%v, printed:\n%s", err, out)
		}
	}
	// Who would lock himself out gets an error, and nothing is changed.
	if _, err := s.egret("agent", "etcd-rbac", "--apply", "--enable"); err == nil || !strings.Contains(err.Error(), "--root") {
		t.Errorf("enabling as an agent: %v", err)
	}
	if out, err := s.egret("root", "etcd-rbac", "--apply", "--enable"); err != nil || !strings.HasSuffix(out, "etcdctl auth enable\n") {
		t.Fatalf("%v, printed:\n%s", err, out)
	}
	if out, err := s.egret("root", "etcd-rbac", "--apply", "--enable"); err != nil || out != "" {
		t.Errorf("once more: %v, printed:\n%s", err, out)
	}
	if _, err := s.egret("agent", "etcd-rbac", "--apply"); err == nil || !strings.Contains(err.Error(), "root") {
		t.Errorf("roles changed as an agent: %v, want an error that names who may", err)
	}

	agent := s.client("agent")
	l, err := agent.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := agent.Claim(t.Context(), l, egress.Owner{IP: netip.MustParseAddr("10.10.0.11"), Node: "n1"}, store.Former{}); !ok || err != nil {
		t.Errorf("an agent claims: %t, %v", ok, err)
	}
	if _, err := agent.Etcd().Put(t.Context(), "/egret/allocations/10.10.0.11", "{}"); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("an agent writes an allocation: %v", err)
	}
	if err := agent.Cordon(t.Context(), egress.Cordon{Node: "n2"}); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("an agent cordons another node: %v", err)
	}
	node, err := store.Encode(egress.Node{Name: "n1", Index: 1})
	if err == nil {
		_, err = s.client("crdsync").Etcd().Put(t.Context(), "/egret/nodes/n1", string(node))
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := s.egret("operator", "cordon", "n1"); err != nil {
		t.Errorf("an operator cordons: %v %s", err, out)
	}
	if out, err := s.egret("operator", "get", "cordons"); err != nil || !strings.Contains(out, "n1") {
		t.Errorf("an operator looks: %v %s", err, out)
	}
	// A good certificate of no user has no rights, and the error says what to do.
	if _, err := s.egret("stranger", "get", "owners"); err == nil || !strings.Contains(err.Error(), "--user") {
		t.Errorf("a stranger looks: %v", err)
	}
}

// TestRolesThatAreKeptLoseNoRight: what the chart runs beside its etcd. A role has what daemons of the version before
// or after may still use, and a full etcd has room again, which is not crdsync's to make then.
func TestRolesThatAreKeptLoseNoRight(t *testing.T) {
	s := newSecured(t, func(cfg *embed.Config) { cfg.QuotaBackendBytes = 8 << 20 })
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	var out syncbuf.Buffer
	go func() {
		c := root()
		c.SetArgs(append([]string{"etcd-rbac", "--apply", "--enable", "--keep", "50ms", "--make-room"}, s.as("root")...))
		c.SetOut(&out)
		ended <- c.ExecuteContext(ctx)
	}()
	until := func(what string, ok func() (bool, error)) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			good, err := ok()
			if good {
				return
			}
			select {
			case err := <-ended:
				t.Fatalf("%s: it ended: %v", what, err)
			default:
			}
			if time.Now().After(end) {
				t.Fatalf("%s: not within a minute: %v\n%s", what, err, out.String())
			}
		}
	}
	agent, chief := s.client("agent").Etcd(), s.client("root").Etcd()
	const owner, allocation = "/egret/owners/10.10.0.11", "/egret/allocations/10.10.0.11"
	until("an agent writes no allocation, and its locks", func() (bool, error) {
		_, refused := agent.Put(t.Context(), allocation, "{}")
		_, err := agent.Put(t.Context(), owner, "{}")
		return errors.Is(refused, rpctypes.ErrPermissionDenied) && err == nil, errors.Join(refused, err)
	})
	// A role of another version: it has one right more, writes what it only reads here, and lacks one.
	end := clientv3.GetPrefixRangeEnd
	for _, err := range []error{
		second(chief.RoleGrantPermission(t.Context(), "egret-agent", "/egret/next/", end("/egret/next/"), clientv3.PermissionType(clientv3.PermReadWrite))),
		second(chief.RoleGrantPermission(t.Context(), "egret-agent", "/egret/pins/", end("/egret/pins/"), clientv3.PermissionType(clientv3.PermReadWrite))),
		second(chief.RoleRevokePermission(t.Context(), "egret-agent", "/egret/owners/", end("/egret/owners/"))),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	until("the right that was lacking is there", func() (bool, error) {
		_, err := agent.Put(t.Context(), owner, "{}")
		return err == nil, err
	})
	for _, key := range []string{"/egret/next/1", "/egret/pins/10.10.0.11"} {
		if _, err := agent.Put(t.Context(), key, "{}"); err != nil {
			t.Errorf("an agent of another version writes %s: %v", key, err)
		}
	}
	// A person is shown what is too much, and takes it away by one more word: agents of the version before may still run.
	apply := func(more ...string) (out []string) {
		t.Helper()
		said, err := s.egret("root", append([]string{"etcd-rbac", "--apply"}, more...)...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(said, "\n")
	}
	revoke, read := `etcdctl role revoke-permission egret-agent "/egret/next/" "/egret/next0"`, "etcdctl role grant-permission --prefix=true egret-agent read /egret/pins/"
	for _, line := range []string{revoke, read} {
		if said := apply(); slices.Contains(said, line) || !slices.Contains(said, "# too much for this version, and taken away with --apply --narrow: "+line) {
			t.Errorf("--apply said:\n%s\nwant that it leaves to --narrow: %s", strings.Join(said, "\n"), line)
		}
	}
	foreign := []string{"/egret/next/1", "/egret/pins/10.10.0.11"}
	for _, key := range foreign {
		if _, err := agent.Put(t.Context(), key, "{}"); err != nil {
			t.Errorf("after --apply an agent of another version writes %s: %v", key, err)
		}
	}
	if said := apply("--narrow"); !slices.Contains(said, revoke) || !slices.Contains(said, read) {
		t.Errorf("--apply --narrow said:\n%s", strings.Join(said, "\n"))
	}
	for _, key := range foreign {
		if _, err := agent.Put(t.Context(), key, "{}"); !errors.Is(err, rpctypes.ErrPermissionDenied) {
			t.Errorf("after --apply --narrow an agent writes %s: %v", key, err)
		}
	}

	value := strings.Repeat("x", 256<<10)
	for i := 0; ; i++ {
		_, err := chief.Put(t.Context(), owner, value)
		if errors.Is(err, rpctypes.ErrNoSpace) {
			break
		}
		if err != nil || i > 100 {
			t.Fatalf("etcd is not full after %d writes: %v", i, err)
		}
	}
	until("etcd has room again", func() (bool, error) {
		_, err := agent.Put(t.Context(), owner, "{}")
		return err == nil, err
	})
	stop()
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

// TestADaemonSaysWhatEtcdDoesNotAllowIt: a new version may write keys that the roles of an older one do not have.
func TestADaemonSaysWhatEtcdDoesNotAllowIt(t *testing.T) {
	s := newSecured(t)
	say := func(who string, grants []store.Grant, foreign, until string) string {
		t.Helper()
		var out syncbuf.Buffer
		stop := sayRights(t.Context(), s.client(who), grants, foreign, slog.New(slog.NewTextHandler(&out, nil)))
		defer stop()
		for end := time.Now().Add(20 * time.Second); !strings.Contains(out.String(), until); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %q is not in %q", who, until, out.String())
			}
		}
		return out.String()
	}
	say("agent", store.AgentGrants, store.IDPrefix, "any client write everything")
	if _, err := s.egret("root", "etcd-rbac", "--apply", "--enable"); err != nil {
		t.Fatal(err)
	}
	newer := append([]store.Grant{{Key: "of-a-newer-version/", Write: true}}, store.AgentGrants...)
	out := say("agent", newer, store.IDPrefix, "write /egret/of-a-newer-version/")
	if strings.Contains(out, "owners") || !strings.Contains(out, "egret etcd-rbac --apply") {
		t.Errorf("said: %s", out)
	}
	for who, grants := range map[string][]store.Grant{"agent": store.AgentGrants, "crdsync": store.CrdsyncGrants} {
		if lacks, err := s.client(who).Lacks(t.Context(), grants); err != nil || len(lacks) > 0 {
			t.Errorf("%s: %v, %v", who, lacks, err)
		}
	}
}

package credentials

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/egret-project/egret/internal/kubetest"
)

// cluster is a namespace of a real API server.
type cluster struct {
	*testing.T
	cfg Config
}

func newCluster(t *testing.T) cluster {
	t.Helper()
	kube, err := kubernetes.NewForConfig(kubetest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "egret-system"}}
	if _, err := kube.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return cluster{t, Config{Kube: kube, Namespace: ns.Name, Etcd: true, Metrics: true, Service: "egret-etcd", Peers: "egret-etcd-peers", Log: slog.New(slog.DiscardHandler)}}
}

func (c cluster) secrets() map[string]corev1.Secret {
	c.Helper()
	list, err := c.cfg.Kube.CoreV1().Secrets(c.cfg.Namespace).List(c.Context(), metav1.ListOptions{})
	if err != nil {
		c.Fatal(err)
	}
	out := map[string]corev1.Secret{}
	for _, s := range list.Items {
		out[s.Name] = s
	}
	return out
}

func (c cluster) once(now time.Time) {
	c.Helper()
	if err := Once(c.Context(), c.cfg, now); err != nil {
		c.Fatal(err)
	}
}

// trusts fails the test unless whoever has the one Secret accepts a member, or a client, that has the other.
func (c cluster) trusts(reader, shown corev1.Secret, now time.Time) {
	c.Helper()
	pair, err := tls.X509KeyPair(shown.Data[corev1.TLSCertKey], shown.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		c.Fatalf("%s: %v", shown.Name, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(reader.Data["ca.crt"]) {
		c.Fatalf("%s has no CA", reader.Name)
	}
	o := x509.VerifyOptions{Roots: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if name := map[string]string{"egret-etcd-server": c.cfg.ServerName(), "egret-metrics-agent": c.cfg.AgentName()}[shown.Name]; name != "" {
		o.KeyUsages, o.DNSName = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, name
	}
	_, err = pair.Leaf.Verify(o)
	if err == nil && shown.Name == "egret-etcd-server" {
		o.DNSName = "egret-etcd-2.egret-etcd-peers.egret-system.svc" // as the other members dial it
		_, err = pair.Leaf.Verify(o)
	}
	if err != nil {
		c.Errorf("at %s, who has %s of revision %s does not trust %s of revision %s: %v",
			now.Format(time.DateOnly), reader.Name, reader.ResourceVersion, shown.Name, shown.ResourceVersion, err)
	}
}

var want = []string{"egret-etcd-agent", "egret-etcd-ca", "egret-etcd-cloud", "egret-etcd-crdsync", "egret-etcd-operator", "egret-etcd-root", "egret-etcd-server", "egret-gossip",
	"egret-metrics-agent", "egret-metrics-ca", "egret-metrics-crdsync", "egret-metrics-operator", "egret-metrics-reader"}

func TestSecretsAreMadeOnceBySeveralAndKept(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	now := time.Now()
	var wg sync.WaitGroup
	errs := make([]error, 5)
	for i := range errs {
		wg.Go(func() { errs[i] = Once(t.Context(), c.cfg, now) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	made := c.secrets()
	if d := cmp.Diff(want, slices.Sorted(maps.Keys(made))); d != "" {
		t.Fatalf("secrets (-want +got):\n%s", d)
	}
	for _, s := range made {
		if s.Name == gossipSecret || s.Name == etcdCA || s.Name == metricsCA {
			continue
		}
		server := "egret-etcd-server"
		if strings.HasPrefix(s.Name, "egret-metrics-") {
			server = "egret-metrics-agent"
		}
		c.trusts(made[server], s, now)
		c.trusts(s, made[server], now)
		if len(s.Data) != 3 {
			t.Errorf("%s has %v: want a certificate, its key, and the CA's certificate", s.Name, slices.Sorted(maps.Keys(s.Data)))
		}
	}
	c.once(now.Add(leafLife / 2))
	for name, s := range c.secrets() {
		if s.ResourceVersion != made[name].ResourceVersion {
			t.Errorf("%s was written again", name)
		}
	}
	// What is deleted is made anew, but for nothing else.
	if err := c.cfg.Kube.CoreV1().Secrets(c.cfg.Namespace).Delete(t.Context(), "egret-etcd-agent", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.once(now)
	for name, s := range c.secrets() {
		if same := s.UID == made[name].UID; same == (name == "egret-etcd-agent") {
			t.Errorf("after egret-etcd-agent was deleted: %s is the same: %v", name, same)
		}
	}
}

// Pods read a changed Secret minutes later, and who was down reads it after days. So of two passes one after the other,
// whatever was written by one is trusted by who has what was written by the other; and at no time is a certificate
// over.
func TestFifteenYearsOfRotationPartNobody(t *testing.T) {
	t.Parallel()
	// Without an API server: several hundred passes would wait for it.
	c := cluster{t, Config{Namespace: "egret-system", Etcd: true, Metrics: true, Service: "egret-etcd", Peers: "egret-etcd-peers"}}
	made := map[string]corev1.Secret{}
	keep := func(name string, _ corev1.SecretType, change change) error {
		data, changed, err := change(made[name].Data)
		if changed {
			made[name] = corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}
		}
		return err
	}
	begin := time.Now()
	var before map[string]corev1.Secret
	var signers = map[string]bool{}
	gossip := ""
	for now := begin; now.Before(begin.Add(15 * 365 * 24 * time.Hour)); now = now.Add(9 * 24 * time.Hour) {
		if err := c.cfg.pass(now, keep); err != nil {
			t.Fatal(err)
		}
		secrets := maps.Clone(made)
		server := secrets["egret-etcd-server"]
		pair, err := tls.X509KeyPair(server.Data[corev1.TLSCertKey], server.Data[corev1.TLSPrivateKeyKey])
		if err != nil {
			t.Fatal(err)
		}
		signers[pair.Leaf.Issuer.String()] = true
		if gossip == "" {
			gossip = string(secrets[gossipSecret].Data["key"])
		}
		if string(secrets[gossipSecret].Data["key"]) != gossip {
			t.Fatal("the gossip has another key")
		}
		for _, one := range []map[string]corev1.Secret{secrets, before} {
			for _, other := range []map[string]corev1.Secret{secrets, before} {
				if one != nil && other != nil {
					c.trusts(one["egret-etcd-agent"], other["egret-etcd-server"], now)
					c.trusts(one["egret-etcd-server"], other["egret-etcd-agent"], now)
					c.trusts(one["egret-metrics-crdsync"], other["egret-metrics-agent"], now)
					c.trusts(one["egret-metrics-agent"], other["egret-metrics-crdsync"], now)
				}
			}
		}
		before = secrets
		if t.Failed() {
			t.FailNow()
		}
	}
	if len(signers) < 3 {
		t.Errorf("%d CAs have signed in 15 years, want three", len(signers))
	}
}

// Whoever deletes the Secret of a CA gets a new one, which nobody trusts yet who is running.
func TestWhatADeletedCASignedStaysTrusted(t *testing.T) {
	t.Parallel()
	c := cluster{t, Config{Namespace: "egret-system", Etcd: true, Metrics: true, Service: "egret-etcd", Peers: "egret-etcd-peers"}}
	made := map[string]corev1.Secret{}
	pass := func(now time.Time) map[string]corev1.Secret {
		t.Helper()
		err := c.cfg.pass(now, func(name string, _ corev1.SecretType, change change) error {
			data, changed, err := change(made[name].Data)
			if changed {
				made[name] = corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return maps.Clone(made)
	}
	now := time.Now()
	before := pass(now)
	signers := map[string]bool{}
	for day := 0; day <= 240; day += 4 {
		if day == 12 || day == 60 { // when what it signed is not due, and when it is
			delete(made, etcdCA)
			delete(made, metricsCA)
		}
		at := now.Add(time.Duration(day) * 24 * time.Hour)
		after := pass(at)
		for _, one := range []map[string]corev1.Secret{after, before} {
			for _, other := range []map[string]corev1.Secret{after, before} {
				c.trusts(one["egret-etcd-agent"], other["egret-etcd-server"], at)
				c.trusts(one["egret-etcd-server"], other["egret-etcd-agent"], at)
			}
		}
		signers[string(after[etcdCA].Data[corev1.TLSPrivateKeyKey])] = true
		before = after
	}
	if len(signers) != 3 {
		t.Errorf("%d CAs, want three", len(signers))
	}
}

// A person replaces the key by two, and later by the new one.
func TestTheKeyOfTheGossipIsMadeInAnyCaseAndLeftAsItIs(t *testing.T) {
	t.Parallel()
	c := Config{Namespace: "egret-system"}
	var have map[string][]byte
	pass := func() {
		t.Helper()
		if err := c.pass(time.Now(), func(name string, _ corev1.SecretType, change change) error {
			data, changed, err := change(have)
			if name != gossipSecret || changed != (have == nil) {
				t.Errorf("Secret %s is written: %v, want %s once", name, changed, gossipSecret)
			}
			have = data
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	pass()
	if key, err := base64.StdEncoding.DecodeString(string(have["key"])); err != nil || len(key) != 32 {
		t.Errorf("the key is %q: want 32 bytes in base64", have["key"])
	}
	have = map[string][]byte{"key": []byte("OLD\nNEW")}
	pass()
	if got := string(have["key"]); got != "OLD\nNEW" {
		t.Errorf("the keys are %q, want those that a person wrote", got)
	}
}

// A CA that cannot be read may be that of a newer version. Another one in its place would part etcd's members.
func TestAFaultyCAIsNotReplaced(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	c.once(time.Now())
	made := c.secrets()
	s := made[etcdCA]
	s.Data[corev1.TLSPrivateKeyKey] = []byte("of another version")
	if _, err := c.cfg.Kube.CoreV1().Secrets(c.cfg.Namespace).Update(t.Context(), &s, metav1.UpdateOptions{}); err == nil {
		err = Once(t.Context(), c.cfg, time.Now())
		if err == nil || !strings.Contains(err.Error(), "Secret egret-system/egret-etcd-ca") || !strings.Contains(err.Error(), "delete it") {
			t.Errorf("error %v: want one that names the Secret and the remedy", err)
		}
	} else {
		t.Fatal(err)
	}
	for name, s := range c.secrets() {
		if name != etcdCA && s.ResourceVersion != made[name].ResourceVersion {
			t.Errorf("%s was written", name)
		}
	}
}

// A certificate opens what it is for, and nothing else: who may read metrics is no client of etcd, an agent reads no
// other's metrics by its own, and neither it nor crdsync nor who reads metrics can be taken for another one.
func TestACertificateIsForOneThingAlone(t *testing.T) {
	t.Parallel()
	c := Config{Namespace: "egret-system", Etcd: true, Metrics: true, Service: "egret-etcd", Peers: "egret-etcd-peers"}
	made := map[string]map[string][]byte{}
	now := time.Now()
	if err := c.pass(now, func(name string, _ corev1.SecretType, change change) error {
		data, _, err := change(made[name])
		made[name] = data
		return err
	}); err != nil {
		t.Fatal(err)
	}
	passes := func(reader, shown, name string, use x509.ExtKeyUsage) bool {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(made[reader]["ca.crt"]) {
			t.Fatalf("%s has no CA", reader)
		}
		pair, err := tls.X509KeyPair(made[shown][corev1.TLSCertKey], made[shown][corev1.TLSPrivateKeyKey])
		if err != nil {
			t.Fatalf("%s: %v", shown, err)
		}
		_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use}, DNSName: name})
		return err == nil
	}
	var leaves []string
	for name := range made {
		if name != gossipSecret && name != etcdCA && name != metricsCA {
			leaves = append(leaves, name)
		}
	}
	clients := map[string][]string{
		"egret-etcd-server":     {"egret-etcd-agent", "egret-etcd-cloud", "egret-etcd-crdsync", "egret-etcd-operator", "egret-etcd-root", "egret-etcd-server"},
		"egret-metrics-agent":   {"egret-metrics-crdsync", "egret-metrics-operator", "egret-metrics-reader"},
		"egret-metrics-crdsync": {"egret-metrics-crdsync", "egret-metrics-operator", "egret-metrics-reader"},
	}
	for server, name := range map[string]string{"egret-etcd-server": c.ServerName(), "egret-metrics-agent": c.AgentName(), "egret-metrics-crdsync": c.CrdsyncName()} {
		for _, shown := range leaves {
			if got, want := passes(server, shown, "", x509.ExtKeyUsageClientAuth), slices.Contains(clients[server], shown); got != want {
				t.Errorf("%s as a client of %s: heard %v, want %v", shown, server, got, want)
			}
			for _, reader := range clients[server] {
				if got, want := passes(reader, shown, name, x509.ExtKeyUsageServerAuth), shown == server; got != want {
					t.Errorf("%s as %s, for %s: taken for it %v, want %v", shown, server, reader, got, want)
				}
			}
		}
	}
}

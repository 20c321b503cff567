package manifests_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/crdsync/credentials"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/manifests"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/store"
)

// metricsFlags are those of a container's arguments that begin so, by name, with the files of its volumes, which
// secrets names by their Secret.
func metricsFlags(t *testing.T, pod corev1.PodSpec, prefix string, secrets func(name string) string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, arg := range pod.Containers[0].Args {
		name, value, _ := strings.Cut(arg, "=")
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		for _, m := range pod.Containers[0].VolumeMounts {
			i := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name })
			if pod.Volumes[i].Secret != nil && strings.HasPrefix(value, m.MountPath+"/") {
				value = filepath.Join(secrets(pod.Volumes[i].Secret.SecretName), strings.TrimPrefix(value, m.MountPath))
			}
		}
		out[name] = value
	}
	return out
}

// One value, and who looks at the status page sees what passes by egress IPs: with the rights that the chart gives it
// `egret credentials` makes what agents and crdsync mount, and by the arguments of both the page hears an agent.
func TestTheValueOfMetricsIsEnoughForTheTrafficOfThePage(t *testing.T) {
	t.Parallel()
	const ns = "egret-system"
	cfg := kubetest.New(t)
	admin, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, o := range manifests.ObjectsOf(t, "metrics and the status page") {
		switch o := o.(type) {
		case *rbacv1.Role:
			_, err = admin.RbacV1().Roles(ns).Create(t.Context(), o, metav1.CreateOptions{})
		case *rbacv1.RoleBinding:
			_, err = admin.RbacV1().RoleBindings(ns).Create(t.Context(), o, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	as := rest.CopyConfig(cfg)
	as.Impersonate.UserName = "system:serviceaccount:" + ns + ":egret-credentials"
	own, err := kubernetes.NewForConfig(as)
	if err != nil {
		t.Fatal(err)
	}
	pods := manifests.PodsOf(t, "metrics and the status page")
	if want := []string{"credentials", "--namespace=$(POD_NAMESPACE)", "--etcd=false", "--metrics"}; !slices.Equal(pods["credentials"].Containers[0].Args, want) {
		t.Errorf("credentials runs with %q, want %q", pods["credentials"].Containers[0].Args, want)
	}
	making := credentials.Config{Kube: own, Namespace: ns, Metrics: true, Log: slog.New(slog.DiscardHandler)}
	// the server hears of roles by a watch of its own
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if err = credentials.Once(t.Context(), making, time.Now()); err == nil || !apierrors.IsForbidden(err) && !strings.Contains(err.Error(), "forbidden") || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	secrets := func(name string) string {
		t.Helper()
		at := filepath.Join(dir, name)
		s, err := admin.CoreV1().Secrets(ns).Get(t.Context(), name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) { // the user's, like that of the page
			return at
		}
		if err == nil {
			err = os.MkdirAll(at, 0o700)
		}
		for key, b := range s.Data {
			if err == nil {
				err = os.WriteFile(filepath.Join(at, key), b, 0o600)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		return at
	}

	// What the agent says of its arguments is nothing but the fault that is in the last.
	serves := metricsFlags(t, pods["agent"], "--metrics-", secrets)
	for _, host := range []string{"10.0.0.1", "2001:db8::1"} {
		args := []string{"agent", "--insecure", "--node=n1", "--log-level=loud", "--who-clients=" + credentials.Operator}
		for name, value := range serves {
			args = append(args, name+"="+strings.ReplaceAll(value, "$(HOST_IP)", host))
		}
		out, _ := exec.Command(manifests.Program(t), args...).CombinedOutput() // always fails: the output is looked at
		if want := "egret: --log-level \"loud\": want debug, info, warn or error\n"; string(out) != want || len(serves) != 4 {
			t.Errorf("egret %q says %q, want %q", args, out, want)
		}
	}

	// An agent of these files, and egret page with the flags that crdsync has for its own page.
	ip, at := netip.MustParseAddr("203.0.113.5"), port.Hold(t)
	s := monitor.New(monitor.Config{Remote: fmt.Sprintf("127.0.0.1:%d", at),
		TLS: monitor.TLS{Cert: serves["--metrics-cert-file"], Key: serves["--metrics-key-file"], ClientCA: serves["--metrics-client-ca-file"]}})
	s.Share(agent.TrafficPage, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(egress.NodeTraffic{Node: "n1", Read: time.Hour, IPs: map[netip.Addr]egress.Traffic{ip: {SentPackets: 7}}})
	}))
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	defer func() { stop(); <-done }()
	server := etcdtest.New(t)
	for key, r := range map[string]any{
		store.NodeKey("n1"):  egress.Node{Name: "n1", Index: 1, Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
		store.OwnerKey(ip):   egress.Owner{IP: ip, Node: "n1", Since: time.Now(), Why: egress.ReasonClaim},
		store.AgentKey("n1"): egress.Agent{Node: "n1", Version: "v1"},
	} {
		value, err := store.Encode(r)
		if err == nil {
			_, err = server.Client().Do(t.Context(), clientv3.OpPut(store.DefaultPrefix+key, string(value)))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	asks := metricsFlags(t, pods["crdsync"], "--agents-", secrets)
	if asks["--agents-port"] != fmt.Sprint(egress.StatusPort) || len(asks) != 5 {
		t.Errorf("crdsync asks agents by %q", asks)
	}
	asks["--agents-port"] = fmt.Sprint(at)
	page := fmt.Sprintf("127.0.0.1:%d", port.Hold(t))
	args := []string{"page", "--endpoints", server.Endpoint(), "--address", page}
	for name, value := range asks {
		args = append(args, name+"="+value)
	}
	c := exec.Command(manifests.Program(t), args...)
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Signal(syscall.SIGTERM); _ = c.Wait() }() // what it was for was seen, or not
	var rows map[netip.Addr]struct {
		SentPackets uint64
		Fault       string
	}
	for end := time.Now().Add(time.Minute); rows[ip].SentPackets != 7; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the page tells %+v of %s, want 7 packets", rows, ip)
		}
		r, err := http.Get("http://" + page + "/traffic?ips=" + ip.String())
		if err != nil {
			continue // it begins
		}
		b, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil || r.StatusCode == http.StatusOK && json.Unmarshal(b, &rows) != nil {
			t.Fatalf("%s, %v", b, err)
		}
	}
}

// What has a page asks agents, and what has none does not: crdsync would not start. Nobody else asks, or is asked.
func TestCrdsyncAsksAgentsForAPageAlone(t *testing.T) {
	t.Parallel()
	for variant, want := range map[string]struct{ serve, ask bool }{
		"as it comes": {}, "bundled etcd": {}, "status page": {},
		"metrics":                         {serve: true},
		"metrics and the status page":     {serve: true, ask: true},
		"metrics, and a page on loopback": {serve: true, ask: true},
	} {
		pods := manifests.PodsOf(t, variant)
		made := slices.Contains(pods["credentials"].Containers[0].Args, "--metrics")
		none := func(name string) string { return name }
		got := []bool{
			len(metricsFlags(t, pods["agent"], "--metrics-", none)) > 0, len(metricsFlags(t, pods["crdsync"], "--metrics-", none)) > 0,
			len(metricsFlags(t, pods["crdsync"], "--agents-", none)) > 0, made}
		for _, command := range []string{"agent", "crdsync"} {
			known := slices.ContainsFunc(pods[command].Containers[0].Env, func(e corev1.EnvVar) bool {
				return e.Name == "HOST_IP" && e.ValueFrom != nil && e.ValueFrom.FieldRef != nil && e.ValueFrom.FieldRef.FieldPath == "status.hostIP"
			})
			if known != want.serve {
				t.Errorf("%s: %s has the address of its node: %v, want %v", variant, command, known, want.serve)
			}
		}
		if want := []bool{want.serve, want.serve, want.ask, want.serve}; !slices.Equal(got, want) {
			t.Errorf("%s: agents serve, crdsync serves, it asks, certificates are made: %v, want %v", variant, got, want)
		}
	}
	// Beside somebody else's etcd credentials goes where crdsync goes.
	if s := manifests.PodsOf(t, "metrics")["credentials"]; s.NodeSelector["c"] != "d" || s.PriorityClassName != "mine" {
		t.Errorf("credentials goes to %v with the priority %s", s.NodeSelector, s.PriorityClassName)
	}
}

// Agents tell crdsync of their kernels where it has a page, unless somebody says otherwise, and of nothing else.
func TestCrdsyncMayTraceForAPageAlone(t *testing.T) {
	t.Parallel()
	for variant, want := range map[string]bool{
		"as it comes": false, "status page": false, "metrics": false, "metrics, and a page that asks no kernels": false,
		"metrics and the status page": true, "metrics, and a page on loopback": true,
	} {
		args := manifests.PodsOf(t, variant)["agent"].Containers[0].Args
		names := slices.DeleteFunc(slices.Clone(args), func(arg string) bool { return !strings.Contains(arg, "-clients") })
		if (len(names) == 1 && names[0] == "--trace-clients="+credentials.Crdsync) != want || len(names) > 1 {
			t.Errorf("%s: agents answer %q; want crdsync for traces: %v", variant, names, want)
		}
	}
}

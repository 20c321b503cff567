package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/pflag"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/egret-project/egret/crdsync/credentials"
	"github.com/egret-project/egret/egress"
)

// standIn answers as an API server whose kubelet forwards ports of a pod of crdsync; integration/kubelet has real ones.
type standIn struct {
	*testing.T
	pod    corev1.Pod
	config map[string]string // of the ConfigMap egret
	secret map[string][]byte // of the Secret of the operator
	relay  string            // where the port of the pod leads
	person string            // who asks, as it tells him; empty: it does not, as one before Kubernetes 1.28
}

// newStandIn installs Egret as the chart does, beside an etcd, and returns the arguments that lead there.
func newStandIn(t *testing.T, s secured) (*standIn, []string) {
	t.Helper()
	_, address := relayed(t, s.url)
	read := func(file string) []byte {
		b, err := os.ReadFile(filepath.Join(s.dir, "operator", file))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	of := func(key string) *corev1.EnvVarSource {
		return &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "egret"}, Key: key}}
	}
	in := &standIn{
		T: t, relay: address,
		pod: corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "egret-crdsync-1", Namespace: "egret-system"},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "crdsync", Env: []corev1.EnvVar{
				{Name: "ETCDCTL_ENDPOINTS", ValueFrom: of("endpoints")}, {Name: "EGRET_ETCD_PREFIX", ValueFrom: of("etcd-prefix")},
			}}}},
			Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		},
		config: map[string]string{"endpoints": s.url, "etcd-prefix": "/of-the-cluster/"},
		secret: map[string][]byte{"ca.crt": read("ca.crt"), "tls.crt": read("tls.crt"), "tls.key": read("tls.key")},
	}
	server := httptest.NewTLSServer(in)
	t.Cleanup(server.Close)
	file := filepath.Join(t.TempDir(), "kubeconfig")
	err := clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters: map[string]*clientcmdapi.Cluster{"c": {Server: server.URL, InsecureSkipTLSVerify: true}}, AuthInfos: map[string]*clientcmdapi.AuthInfo{"u": {Token: "t"}},
		Contexts: map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}}, CurrentContext: "x",
	}, file)
	if err != nil {
		t.Fatal(err)
	}
	return in, []string{"--kubeconfig", file}
}

func (s *standIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	const ns = "/api/v1/namespaces/egret-system"
	answer := func(object any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(object) // the client has gone
	}
	switch r.URL.Path {
	case ns + "/pods":
		answer(corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: []corev1.Pod{s.pod}})
	case "/apis/authentication.k8s.io/v1/selfsubjectreviews":
		if s.person == "" {
			http.NotFound(w, r)
			return
		}
		answer(authenticationv1.SelfSubjectReview{
			TypeMeta: metav1.TypeMeta{Kind: "SelfSubjectReview", APIVersion: "authentication.k8s.io/v1"},
			Status:   authenticationv1.SelfSubjectReviewStatus{UserInfo: authenticationv1.UserInfo{Username: s.person}},
		})
	case ns + "/configmaps/egret":
		answer(corev1.ConfigMap{TypeMeta: metav1.TypeMeta{Kind: "ConfigMap", APIVersion: "v1"}, Data: s.config})
	case ns + "/secrets/" + credentials.OperatorSecret:
		if s.secret == nil {
			w.WriteHeader(http.StatusForbidden)
			answer(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: metav1.StatusReasonForbidden, Code: http.StatusForbidden, Message: "secrets is forbidden"})
			return
		}
		answer(corev1.Secret{TypeMeta: metav1.TypeMeta{Kind: "Secret", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: credentials.OperatorSecret, Namespace: "egret-system"}, Data: s.secret})
	case ns + "/pods/" + s.pod.Name + "/portforward":
		if r.Method != http.MethodPost { // a websocket: this one knows SPDY alone
			http.Error(w, "want SPDY", http.StatusBadRequest)
			return
		}
		s.forward(w, r)
	default:
		http.NotFound(w, r)
	}
}

// forward speaks the kubelet's part of the protocol: an error stream and a data stream for each connection.
func (s *standIn) forward(w http.ResponseWriter, r *http.Request) {
	if _, err := httpstream.Handshake(r, w, []string{portforward.PortForwardProtocolV1Name}); err != nil {
		s.Error(err)
		return
	}
	var wg sync.WaitGroup
	c := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(stream httpstream.Stream, answered <-chan struct{}) error {
		if stream.Headers().Get(corev1.StreamType) == corev1.StreamTypeError {
			wg.Go(func() { <-answered; _ = stream.Close() }) // no error
			return nil
		}
		if got, want := stream.Headers().Get(corev1.PortHeader), fmt.Sprint(egress.EtcdRelayPort); got != want {
			return fmt.Errorf("port %s, want %s", got, want)
		}
		wg.Go(func() {
			to, err := net.Dial("tcp", s.relay)
			if err != nil {
				s.Error(err)
				return
			}
			defer to.Close()
			go func() { _, _ = io.Copy(to, stream); _ = to.Close() }() // it ends with the connection
			_, _ = io.Copy(stream, to)
			_ = stream.Close()
		})
		return nil
	})
	if c == nil {
		return
	}
	<-c.CloseChan()
	wg.Wait()
}

// An operator has a kubeconfig, and neither a way to etcd nor its certificates.
func TestTheClusterLeadsToEtcd(t *testing.T) {
	s := newSecured(t)
	in, flags := newStandIn(t, s)
	etcd := s.client("root").Etcd()
	if _, err := etcd.Put(t.Context(), "/of-the-cluster/nodes/node-1", `{"name":"node-1","index":1}`); err != nil {
		t.Fatal(err)
	}
	out, err := run(t, append([]string{"get", "nodes"}, flags...)...)
	if err != nil || !strings.Contains(out, "node-1") {
		t.Errorf("%v\n%s\nwant node-1, below the cluster's own prefix", err, out)
	}
	t.Setenv("KUBECONFIG", flags[1])
	was := os.Args[0]
	os.Args[0] = "kubectl-egret"
	if out, err = run(t, "get", "nodes"); err != nil || !strings.Contains(out, "node-1") {
		t.Errorf("as kubectl's plugin: %v\n%s", err, out)
	}
	os.Args[0] = was
	if out, err = run(t, append([]string{"cordon", "node-1", "--yes"}, flags...)...); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	acts, err := run(t, append([]string{"get", "acts"}, flags...)...)
	if err != nil || !strings.Contains(acts, "(Kubernetes user u of the kubeconfig) (certificate CN=egret-operator") {
		t.Errorf("%v\n%s\nwant who did it, by the kubeconfig and the certificate of the Secret", err, acts)
	}
	in.person = "ann@example.org" // the certificate is one of all operators: it is the API server that tells them apart
	if out, err = run(t, append([]string{"uncordon", "node-1"}, flags...)...); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	acts, err = run(t, append([]string{"get", "acts", "-o", `jsonpath={.items[?(@.what=="uncordon")].by}`}, flags...)...)
	if err != nil || !strings.Contains(acts, "(Kubernetes user ann@example.org) (certificate CN=egret-operator") {
		t.Errorf("%v\n%s\nwant who did it, by the API server", err, acts)
	}

	in.secret = nil
	if _, err = run(t, append([]string{"get", "nodes"}, flags...)...); err == nil || !strings.Contains(err.Error(), "--cert") || !strings.Contains(err.Error(), "the right to read it") {
		t.Errorf("without the right to read the Secret: %v, want what to do", err)
	}
	own := s.as("operator")[2:] // without --endpoints
	if out, err = run(t, append(append([]string{"get", "nodes"}, flags...), own...)...); err != nil || !strings.Contains(out, "node-1") {
		t.Errorf("with a certificate of one's own: %v\n%s", err, out)
	}
}

// Who calls kubectl has a kubeconfig, and most often no way to etcd.
func TestThePluginGoesThroughTheClusterUnlessItIsToldOfEndpoints(t *testing.T) {
	was := os.Args[0]
	defer func() { os.Args[0] = was }()
	for name, tt := range map[string]struct {
		as, variable string
		args         []string
		want         bool
	}{
		"the plugin":                         {"/usr/local/bin/kubectl-egret", "", nil, true},
		"its completion":                     {kubectlCompletes, "", nil, true},
		"the plugin, with endpoints":         {"kubectl-egret", "", []string{"--endpoints", "127.0.0.1:2379"}, false},
		"the plugin, and ETCDCTL_ENDPOINTS":  {"kubectl-egret", "10.0.0.1:2379", nil, false},
		"the plugin, with both":              {"kubectl-egret", "10.0.0.1:2379", []string{"--context", "prod"}, true},
		"the command":                        {"egret", "", nil, false},
		"the command, with a kubeconfig":     {"egret", "", []string{"--kubeconfig", "file"}, true},
		"the command, and ETCDCTL_ENDPOINTS": {"egret", "10.0.0.1:2379", nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("ETCDCTL_ENDPOINTS", tt.variable)
			if os.Args[0] = tt.as; tt.variable == "" {
				os.Unsetenv("ETCDCTL_ENDPOINTS")
			}
			var f etcdFlags
			s := pflag.NewFlagSet("", pflag.ContinueOnError)
			f.addOperator(s)
			if err := errors.Join(s.Parse(tt.args), fromEnvironment(s)); err != nil || f.cluster.wanted() != tt.want {
				t.Errorf("%v; through the cluster: %t, want %t", err, f.cluster.wanted(), tt.want)
			}
		})
	}
	os.Args[0] = "kubectl-egret"
	var daemon etcdFlags
	daemon.add(pflag.NewFlagSet("", pflag.ContinueOnError))
	if daemon.cluster.wanted() {
		t.Error("what is no command of an operator's goes through the cluster")
	}
}

func TestWhoHasNoWayToEtcdIsToldOfTheOneThroughTheCluster(t *testing.T) {
	_, err := run(t, "status", "--endpoints", "127.0.0.1:1", "--dial-timeout", "100ms")
	if err == nil || !strings.Contains(err.Error(), "check --endpoints, or give --kubeconfig or --context") {
		t.Errorf("%v: want the remedies", err)
	}
}

// The way through the cluster is not trusted: what answers there has to show the certificate of etcd.
func TestWhatTheClusterLeadsToHasToBeEtcd(t *testing.T) {
	s := newSecured(t)
	in, flags := newStandIn(t, s)
	in.config["endpoints"] = "https://192.0.2.7:2379" // the certificate is of another address
	_, err := run(t, append([]string{"get", "nodes", "--dial-timeout", "3s"}, flags...)...)
	if err == nil || !strings.Contains(err.Error(), "192.0.2.7") || !strings.Contains(err.Error(), "--etcd-server-name") {
		t.Errorf("%v: want that the certificate is another's", err)
	}
	if out, err := run(t, append([]string{"get", "nodes", "--etcd-server-name", "localhost"}, flags...)...); err != nil {
		t.Errorf("with the right name: %v\n%s", err, out)
	}
	in.config["endpoints"] = s.url
	in.secret["ca.crt"] = newAuthorityPEM(t)
	if _, err = run(t, append([]string{"get", "nodes", "--dial-timeout", "3s"}, flags...)...); err == nil || !strings.Contains(err.Error(), "etcd's certificate") {
		t.Errorf("%v: want that another CA signed it", err)
	}
}

// newAuthorityPEM returns the certificate of a CA that signed nothing.
func newAuthorityPEM(t *testing.T) []byte {
	t.Helper()
	a := newAuthority(t)
	dir := t.TempDir()
	a.write(dir, a.pair(0, "nobody"))
	b, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestWhatTheClusterLacksIsNamed(t *testing.T) {
	s := newSecured(t)
	for name, tt := range map[string]struct {
		is   func(*standIn)
		args []string
		want []string
	}{
		"no such file":        {args: []string{"--kubeconfig", "/no/such/file"}, want: []string{"/no/such/file"}},
		"no such context":     {args: []string{"--context", "elsewhere"}, want: []string{"elsewhere"}},
		"another namespace":   {args: []string{"--namespace", "other"}, want: []string{"namespace other"}},
		"crdsync is not well": {is: func(in *standIn) { in.pod.Status.Conditions = nil }, want: []string{"none is ready", "kubectl get pods"}},
		"crdsync goes":        {is: func(in *standIn) { in.pod.DeletionTimestamp = &metav1.Time{Time: time.Now()} }, want: []string{"none is ready"}},
		"crdsync says of no etcd": {
			is: func(in *standIn) { delete(in.config, "endpoints") }, want: []string{"egret-crdsync-1", "ETCDCTL_ENDPOINTS"},
		},
		"a Secret that is none": {is: func(in *standIn) { in.secret["tls.key"] = []byte("x") }, want: []string{credentials.OperatorSecret}},
		"a Secret without CA":   {is: func(in *standIn) { in.secret["ca.crt"] = nil }, want: []string{credentials.OperatorSecret, "ca.crt"}},
		"a crdsync without a relay": {
			is: func(in *standIn) { in.pod.Name = "egret-crdsync-2"; in.relay = "127.0.0.1:1" }, args: []string{"--dial-timeout", "300ms"}, want: []string{"egret-crdsync-2"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			in, flags := newStandIn(t, s)
			if tt.is != nil {
				tt.is(in)
			}
			if in.relay == "127.0.0.1:1" {
				in.relay = backend(t) // it is no etcd
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			c := root()
			c.SetArgs(append(append([]string{"get", "nodes"}, flags...), tt.args...))
			c.SetOut(io.Discard)
			err := c.ExecuteContext(ctx)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v: want %q in it", err, want)
				}
			}
		})
	}
}

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/egret-project/egret/crdsync/credentials"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// clusterFlags lead to etcd through the Kubernetes API: by a port-forward to a pod of crdsync, which passes connections
// on to etcd (relay). etcd is spoken to by TLS from end to end.
type clusterFlags struct {
	kubeconfig, context, namespace string
	endpoints                      *pflag.Flag // --endpoints; nil: the command does not reach etcd through the cluster
}

func (f *clusterFlags) add(s *pflag.FlagSet) {
	f.endpoints = s.Lookup("endpoints")
	s.StringVar(&f.kubeconfig, "kubeconfig", "", "reach etcd through the cluster of this kubeconfig file, by a port-forward to crdsync, rather than by --endpoints")
	s.StringVar(&f.context, "context", "", "the same by this context of the kubeconfig (default file: as kubectl's)")
	s.StringVarP(&f.namespace, "namespace", "n", "egret-system", "the namespace that Egret is installed in: there --kubeconfig and --context look for crdsync")
}

// wanted reports whether the cluster is the way to etcd: also for the plugin of kubectl that is told of no other one,
// since who calls it has a kubeconfig.
func (f *clusterFlags) wanted() bool {
	return f.kubeconfig != "" || f.context != "" || f.endpoints != nil && !f.endpoints.Changed && isPlugin()
}

// installed is what an operator's command has to know of an installation.
type installed struct {
	kube      *rest.Config
	client    *kubernetes.Clientset
	pod       *corev1.Pod // of crdsync
	endpoints []string    // of etcd, as that pod has them
	prefix    string
	name      string // that etcd's certificate is to have; empty: that of the endpoint
	user      string // as the kubeconfig calls him
}

// find reads what the cluster says of Egret. An error names what is missing, and what to do.
func (f *clusterFlags) find(ctx context.Context) (*installed, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = f.kubeconfig
	of := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: f.context})
	kube, err := of.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("reading --kubeconfig %q, --context %q: %w (--endpoints leads to etcd without them)", f.kubeconfig, f.context, err)
	}
	client, err := kubernetes.NewForConfig(kube)
	if err != nil {
		return nil, err
	}
	const label = "app.kubernetes.io/name=egret-crdsync"
	pods, err := client.CoreV1().Pods(f.namespace).List(ctx, metav1.ListOptions{LabelSelector: label})
	if err != nil {
		return nil, fmt.Errorf("looking for crdsync in the namespace %s: %w", f.namespace, err)
	}
	i := slices.IndexFunc(pods.Items, ready)
	if i < 0 {
		return nil, fmt.Errorf("of %d pods of crdsync in the namespace %s none is ready: see kubectl get pods -n %[2]s -l %s, or give --namespace", len(pods.Items), f.namespace, label)
	}
	out := &installed{kube: kube, client: client, pod: &pods.Items[i]}
	if raw, err := of.RawConfig(); err == nil { // it was read above
		if in := raw.Contexts[cmp.Or(f.context, raw.CurrentContext)]; in != nil {
			out.user = in.AuthInfo
		}
	}
	var endpoints string
	for name, to := range map[string]*string{"ETCDCTL_ENDPOINTS": &endpoints, "EGRET_ETCD_PREFIX": &out.prefix, "EGRET_ETCD_SERVER_NAME": &out.name} {
		if *to, err = out.variable(ctx, name); err != nil {
			return nil, fmt.Errorf("reading how pod %s reaches etcd: %w", out.pod.Name, err)
		}
	}
	if out.endpoints = strings.FieldsFunc(endpoints, func(r rune) bool { return r == ',' }); len(out.endpoints) == 0 {
		return nil, fmt.Errorf("pod %s says of no etcd in ETCDCTL_ENDPOINTS: give --endpoints rather than --kubeconfig", out.pod.Name)
	}
	return out, nil
}

// person returns who it is that the API server is shown: by its answer, and where it does not tell, as the kubeconfig
// calls him.
func (i *installed) person(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	is, err := i.client.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err == nil && is.Status.UserInfo.Username != "" {
		return is.Status.UserInfo.Username
	}
	if i.user == "" {
		return ""
	}
	return i.user + " of the kubeconfig"
}

// ready reports whether a pod runs, and stays.
func ready(p corev1.Pod) bool {
	return p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// variable returns the value of an environment variable of the pod, its own or that of a ConfigMap's key; empty: it has
// none.
func (i *installed) variable(ctx context.Context, name string) (string, error) {
	for _, c := range i.pod.Spec.Containers {
		for _, e := range c.Env {
			if e.Name != name {
				continue
			}
			if e.ValueFrom == nil || e.ValueFrom.ConfigMapKeyRef == nil {
				return e.Value, nil
			}
			ref := e.ValueFrom.ConfigMapKeyRef
			m, err := i.client.CoreV1().ConfigMaps(i.pod.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
			if err != nil {
				return "", err
			}
			return m.Data[ref.Key], nil
		}
	}
	return "", nil
}

// dialThrough returns a client of etcd whose connections go through the cluster until ctx ends.
func (f *etcdFlags) dialThrough(ctx context.Context, log *slog.Logger) (*store.Client, error) {
	is, err := f.cluster.find(ctx)
	if err != nil {
		return nil, err
	}
	// The members' own addresses are the cluster's: etcd is not asked for them.
	cfg := store.Config{Prefix: f.prefix, DialTimeout: f.dialTimeout, MemberInterval: 24 * time.Hour, Relayed: true, Log: log}
	if f.prefix == store.DefaultPrefix {
		cfg.Prefix = is.prefix
	}
	scheme := "http"
	if strings.HasPrefix(is.endpoints[0], "https://") {
		scheme = "https"
		if cfg.TLS, err = f.tlsThrough(ctx, is); err != nil {
			return nil, err
		}
	}
	var plain string
	if cfg.TLS == nil {
		plain = is.endpoints[0]
	}
	if cfg.Username, cfg.Password, err = f.credentials(plain); err != nil {
		return nil, err
	}
	if f.acts {
		cfg.By = f.by(cfg.TLS, is.person(ctx))
	}
	local, err := is.forward(ctx, egress.EtcdRelayPort)
	if err != nil {
		return nil, err
	}
	cfg.Endpoints = []string{scheme + "://" + local}
	client, err := store.Dial(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("through pod %s of the namespace %s: %w", is.pod.Name, is.pod.Namespace, err)
	}
	return client, nil
}

// tlsThrough is the TLS of a connection to etcd through the cluster: by the certificates that the flags name, else by
// those of the operator's Secret.
func (f *etcdFlags) tlsThrough(ctx context.Context, is *installed) (*tls.Config, error) {
	var out *tls.Config
	var err error
	if f.cert != "" || f.key != "" || f.cacert != "" {
		if out, err = f.readTLS(); err != nil {
			return nil, err
		}
	} else if out, err = is.operatorTLS(ctx); err != nil {
		return nil, err
	}
	out.InsecureSkipVerify = f.insecureSkipVerify
	names := []string{f.serverName}
	switch {
	case f.serverName != "":
	case is.name != "":
		names = []string{is.name}
	default: // whichever of them crdsync connects with
		names = nil
		for _, e := range is.endpoints {
			if host, _, err := net.SplitHostPort(hostPort(e)); err == nil {
				names = append(names, host)
			}
		}
	}
	if !out.InsecureSkipVerify {
		verifyAs(out, names)
	}
	return out, nil
}

// verifyAs has a peer's certificate checked against one of the names, where the address that is dialled says nothing.
func verifyAs(c *tls.Config, names []string) {
	roots := c.RootCAs
	c.InsecureSkipVerify = true // of the name that was dialled; what follows is the check
	c.VerifyConnection = func(s tls.ConnectionState) error {
		o := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
		for _, cert := range s.PeerCertificates[1:] {
			o.Intermediates.AddCert(cert)
		}
		if _, err := s.PeerCertificates[0].Verify(o); err != nil {
			return fmt.Errorf("etcd's certificate: %w", err)
		}
		var errs []error
		for _, name := range names {
			err := s.PeerCertificates[0].VerifyHostname(name)
			if err == nil {
				return nil
			}
			errs = append(errs, err)
		}
		return fmt.Errorf("etcd's certificate: %w (--etcd-server-name says which it has)", errors.Join(errs...))
	}
}

// operatorTLS reads the operator's certificate, and the CA of etcd's, from their Secret.
func (i *installed) operatorTLS(ctx context.Context) (*tls.Config, error) {
	s, err := i.client.CoreV1().Secrets(i.pod.Namespace).Get(ctx, credentials.OperatorSecret, metav1.GetOptions{})
	if err != nil {
		hint := "give --cacert, --cert and --key"
		if apierrors.IsForbidden(err) {
			hint += ", or ask for the right to read it"
		}
		return nil, fmt.Errorf("reading the operator's certificate: %w: %s", err, hint)
	}
	pair, err := tls.X509KeyPair(s.Data[corev1.TLSCertKey], s.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return nil, fmt.Errorf("the certificate in the Secret %s/%s: %w", s.Namespace, s.Name, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(s.Data["ca.crt"]) {
		return nil, fmt.Errorf("the Secret %s/%s has no CA certificate in ca.crt", s.Namespace, s.Name)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, RootCAs: roots}, nil
}

// forward forwards a free port of 127.0.0.1 to a port on loopback of the pod until ctx ends, and returns it as
// host:port.
func (i *installed) forward(ctx context.Context, port int) (string, error) {
	url := i.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(i.pod.Namespace).Name(i.pod.Name).SubResource("portforward").URL()
	transport, upgrader, err := spdy.RoundTripperFor(i.kube)
	if err != nil {
		return "", err
	}
	overWebsocket, err := portforward.NewSPDYOverWebsocketDialer(url, i.kube)
	if err != nil {
		return "", err
	}
	// As kubectl does: an API server before Kubernetes 1.31, or a proxy before it, may know SPDY alone.
	dialer := portforward.NewFallbackDialer(overWebsocket, spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, url),
		func(err error) bool { return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err) })
	var said bytes.Buffer
	opened := make(chan struct{})
	f, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{fmt.Sprintf("0:%d", port)}, ctx.Done(), opened, io.Discard, &said)
	if err != nil {
		return "", err
	}
	failed := make(chan error, 1)
	go func() { failed <- f.ForwardPorts() }()
	select {
	case err := <-failed:
		return "", fmt.Errorf("forwarding a port to pod %s of the namespace %s: %w %s", i.pod.Name, i.pod.Namespace, err, strings.TrimSpace(said.String()))
	case <-opened:
	}
	ports, err := f.GetPorts()
	if err != nil || len(ports) != 1 {
		return "", fmt.Errorf("forwarding a port to pod %s: %d ports, %w", i.pod.Name, len(ports), err)
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0].Local), nil
}

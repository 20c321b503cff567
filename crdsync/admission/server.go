package admission

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/crdsync/certificate"
	"github.com/egret-project/egret/crdsync/spec"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
)

// Name is that of the ValidatingWebhookConfiguration and of the Service; Path is where reviews are answered.
const (
	Name = "egret-crdsync"
	Path = "/validate"
)

const (
	// refresh is how often the CA and its place in the configuration are looked at.
	refresh = time.Minute
	// retry is for what did not work: the CA, its place in the configuration, the port.
	retry        = 5 * time.Second
	callTimeout  = 10 * time.Second
	stopTimeout  = time.Second // an answer takes milliseconds
	readTimeout  = 10 * time.Second
	writeTimeout = 30 * time.Second // longer than an API server may wait
	// maxConnections are open at a time. An API server has one or two.
	maxConnections = 64
	maxHeader      = 16 << 10
)

// Config says where to answer, and what from.
type Config struct {
	Kube *rest.Config
	// Address is what to listen at, host:port. The certificate is for the Service, and for the host where that is an IP.
	Address string
	// Namespace is that of the Service, and of the Secret with the CA.
	Namespace string
	// ClientCA is a file with the CAs, in PEM, of the certificates that clients have to show, and Clients are the common names that these have;
	// both empty: whoever reaches the address is answered. The file is read again when it is replaced.
	ClientCA string
	Clients  []string
	// InUse returns the addresses that are allocated. An error: that is not known now.
	InUse func() ([]egress.Allocation, error)
	Log   *slog.Logger
	// Reviewed is called with the result of each review: allowed, refused, or failed. nil: it is not.
	Reviewed func(verdict string)
	// Certified is called when there is a certificate to answer with. nil: it is not.
	Certified func()
}

// Validate returns all that is wrong with who may ask.
func (c Config) Validate() error {
	return newClients(c.ClientCA, c.Clients, nil).validate()
}

// Run answers the API server's reviews until ctx ends, and then returns ctx's error. A port that is taken, or a cluster that does not let
// us keep a CA, is reported and tried again.
func Run(ctx context.Context, cfg Config) error {
	kube, err1 := kubernetes.NewForConfig(cfg.Kube)
	dyn, err2 := dynamic.NewForConfig(cfg.Kube)
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("making a client of the Kubernetes API: %w", err)
	}
	s := &server{Config: cfg, kube: kube, dynamic: dyn}
	g, ctx := errgroup.WithContext(ctx)
	changed := make(chan struct{}, 1)
	g.Go(func() error { s.watch(ctx, changed); return nil })
	g.Go(func() error { return s.every(ctx, "the webhook's certificate", s.certify, changed) })
	g.Go(func() error { return s.every(ctx, "the webhook's server", s.serve, nil) })
	return g.Wait()
}

type server struct {
	Config
	kube    kubernetes.Interface
	dynamic dynamic.Interface
	current atomic.Pointer[tls.Certificate]
	issuer  string // the CA that current is of; for certify alone
}

// watch sends to changed when the configuration that makes the API server ask us is made, changed or deleted, until ctx ends: applied
// anew, it trusts nobody; and another replica may have made a new CA.
func (s *server) watch(ctx context.Context, changed chan<- struct{}) {
	tell := func(any) {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(s.kube.AdmissionregistrationV1().RESTClient(), "validatingwebhookconfigurations",
			metav1.NamespaceAll, fields.OneTermEqualSelector("metadata.name", Name)),
		ObjectType: &admissionregistrationv1.ValidatingWebhookConfiguration{},
		Handler:    cache.ResourceEventHandlerFuncs{AddFunc: tell, UpdateFunc: func(_, o any) { tell(o) }, DeleteFunc: tell},
	})
	informer.RunWithContext(ctx)
}

// every does something every interval until ctx ends, and at once on wake. What goes wrong is logged once, for as long
// as it stays the same.
func (s *server) every(ctx context.Context, what string, do func(context.Context) error, wake <-chan struct{}) error {
	said := ""
	for {
		err := do(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		wait := refresh
		if err != nil {
			wait = retry
			if err.Error() != said {
				s.Log.Warn(what+" does not work, will retry", "err", err, "dur", wait)
			}
			said = err.Error()
		} else {
			said = ""
		}
		select {
		case <-time.After(wait):
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// certify sees to it that there is a certificate that the API server trusts.
func (s *server) certify(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	now := time.Now()
	a, err := loadAuthority(ctx, s.kube, s.Namespace, now)
	if err != nil {
		return err
	}
	// The CA is published before its certificate is shown. Where that does not work, no certificate is worse than one.
	err = a.publish(ctx, s.kube)
	c := s.current.Load()
	if c != nil && !certificate.Due(c.Leaf, now) && (err != nil || s.issuer == string(a.cert.Raw)) {
		return err
	}
	names, ips := s.names()
	c, issueErr := a.serve(now, names, ips)
	if issueErr == nil {
		s.current.Store(c)
		s.issuer = string(a.cert.Raw)
		if s.Certified != nil {
			s.Certified()
		}
	}
	return errors.Join(err, issueErr)
}

func (s *server) names() ([]string, []net.IP) {
	service := Name + "." + s.Namespace
	var ips []net.IP
	host, _, _ := net.SplitHostPort(s.Address) // what is wrong with it, listening says
	if ip := net.ParseIP(host); ip != nil {
		ips = append(ips, ip)
	}
	return []string{service + ".svc", service + ".svc.cluster.local", service}, ips
}

func (s *server) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c := s.current.Load(); c != nil {
		return c, nil
	}
	return nil, errors.New("there is no certificate yet")
}

// serve answers until ctx ends.
func (s *server) serve(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.Handle("POST "+Path, &reviewer{pools: s.pools, inUse: s.InUse, log: s.Log, reviewed: s.Reviewed})
	asking := newClients(s.ClientCA, s.Clients, s.Log)
	h := &http.Server{
		Addr: s.Address, Handler: mux, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, MaxHeaderBytes: maxHeader,
		TLSConfig: asking.config(&tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.certificate}),
		ErrorLog:  slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug), // whoever knocks at the port
		// No HTTP/2: one connection would bring hundreds of reviews at a time, and each may take maxReview of memory.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	listener, err := net.Listen("tcp", s.Address)
	if err != nil {
		return err
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if h.Shutdown(end) != nil {
			_ = h.Close() // nobody waits for an answer any more
		}
	})
	err = h.ServeTLS(monitor.Limit(listener, maxConnections), "", "")
	if !stop() {
		<-stopped
	}
	return err
}

// pools reads all pools, and why some cannot be read.
func (s *server) pools(ctx context.Context) (map[string]egress.Pool, map[string]error, error) {
	list, err := s.dynamic.Resource(v1beta1.PoolResource).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, fmt.Errorf("listing pools: %w", err)
	}
	pools, unread := map[string]egress.Pool{}, map[string]error{}
	for _, u := range list.Items {
		var e v1beta1.ExternalIPPool
		err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &e)
		if err == nil {
			var p egress.Pool
			if p, err = spec.Pool(u.GetName(), e.Spec); err == nil {
				pools[p.Name] = p
			}
		}
		if err != nil {
			unread[u.GetName()] = err
		}
	}
	return pools, unread, nil
}

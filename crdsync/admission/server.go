package admission

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
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
	// restTime is for how long a connection may wait for a further question. API servers close one after 90 s: of who
	// closes it while the other one asks, a question is lost.
	restTime  = 2 * time.Minute
	maxHeader = 16 << 10
)

// Config says where to answer, and what from.
type Config struct {
	Kube *rest.Config
	// Address is what to listen at, host:port. The certificate is for the Service, and for the host where that is an
	// IP.
	Address string
	// Namespace is that of the Service, and of the Secret with the CA.
	Namespace string
	// ClientCA is a file with the CAs, in PEM, of the certificates that clients have to show, and Clients are the
	// common names that these have; both empty: whoever reaches the address is answered. The file is read again when it
	// is replaced.
	ClientCA string
	Clients  []string
	// InUse returns the addresses that are allocated. An error: that is not known now.
	InUse func() ([]egress.Allocation, error)
	Log   *slog.Logger
	// Reviewed is called with the result of each review: allowed, refused, or failed. nil: it is not.
	Reviewed func(verdict string)
	// Answers is called once, when who connects is answered: there is a port, and a certificate. nil: it is not.
	Answers func()
}

// Validate returns all that is wrong with who may ask.
func (c Config) Validate() error {
	return newClients(c.ClientCA, c.Clients, nil).validate()
}

// Run answers the API server's reviews until ctx ends, and then returns ctx's error. A port that is taken, or a cluster
// that does not let us keep a CA, is reported and tried again.
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
	listens atomic.Bool
	told    sync.Once // Answers
	issuer  string    // the CA that current is of; for certify alone
	listed  shared[listing]
	used    shared[[]egress.Allocation]
}

// answers tells Answers, once there is all that an answer takes.
func (s *server) answers() {
	if s.Answers != nil && s.listens.Load() && s.current.Load() != nil {
		s.told.Do(s.Answers)
	}
}

// watch sends to changed when the configuration that makes the API server ask us is made, changed or deleted, until ctx
// ends: applied anew, it trusts nobody; and another replica may have made a new CA.
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
		s.answers()
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

func (s *server) reviewer() *reviewer {
	return &reviewer{pools: s.pools, inUse: s.inUse, log: s.Log, frank: len(s.Clients) > 0, reviewed: s.Reviewed}
}

// serve answers until ctx ends.
func (s *server) serve(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.Handle("POST "+Path, s.reviewer())
	listener, err := net.Listen("tcp", s.Address)
	if err != nil {
		return err
	}
	s.listens.Store(true)
	s.answers()
	asking, open := newClients(s.ClientCA, s.Clients, s.Log), newConnections(listener)
	h := &http.Server{
		Addr: s.Address, Handler: open.limit(mux), ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: restTime, MaxHeaderBytes: maxHeader,
		TLSConfig:   asking.config(&tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.certificate}),
		ErrorLog:    slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug), // whoever knocks at the port
		ConnContext: inContext, ConnState: changed,
		// No HTTP/2: one connection would bring hundreds of reviews at a time, and each may take maxReview of memory.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
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
	err = h.ServeTLS(open, "", "")
	if !stop() {
		<-stopped
	}
	return err
}

// listing is what a reading of the pools says: those that can be read, and why others cannot.
type listing struct {
	pools  map[string]egress.Pool
	unread map[string]error
}

// pools reads all pools, and why some cannot be read, later than now.
func (s *server) pools(ctx context.Context) (map[string]egress.Pool, map[string]error, error) {
	l, err := s.listed.read(ctx, s.list)
	return l.pools, l.unread, err
}

func (s *server) inUse(ctx context.Context) ([]egress.Allocation, error) {
	return s.used.read(ctx, func(context.Context) ([]egress.Allocation, error) { return s.InUse() })
}

func (s *server) list(ctx context.Context) (listing, error) {
	list, err := s.dynamic.Resource(v1beta1.PoolResource).List(ctx, metav1.ListOptions{})
	if err != nil {
		return listing{}, fmt.Errorf("listing pools: %w", err)
	}
	out := listing{map[string]egress.Pool{}, map[string]error{}}
	for _, u := range list.Items {
		var e v1beta1.ExternalIPPool
		err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &e)
		if err == nil {
			var p egress.Pool
			if p, err = spec.Pool(u.GetName(), e.Spec); err == nil {
				out.pools[p.Name] = p
			}
		}
		if err != nil {
			out.unread[u.GetName()] = err
		}
	}
	return out, nil
}

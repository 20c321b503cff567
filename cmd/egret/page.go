package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/crdsync"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/page"
	"github.com/egret-project/egret/store"
)

// maxPage is how many connections the status page may have open at each address: of who may look, the viewers' and
// those of their questions, and as many of others. As long as fewer than this many connect while he says who he is,
// which takes milliseconds, he is heard.
const maxPage = 128

func pageCommand() *cobra.Command {
	var etcd etcdFlags
	var agents agentsFlags
	var address string
	c := &cobra.Command{
		Use:   "page",
		Short: "Serve the status page on this machine, until it is interrupted",
		Long: "Serve the status page on this machine, until it is interrupted: what egret status, describe and trace\n" +
			"print, live in a browser, and with --agents-port what passes by the egress IPs on the screen, by their\n" +
			"gateways, and traces by kernels, too. It changes nothing. Every user of this machine can look at it meanwhile.",
		Args: cobra.NoArgs,
	}
	etcd.addOperator(c.Flags())
	agents.add(c.Flags())
	c.Flags().StringVar(&address, "address", fmt.Sprintf("127.0.0.1:%d", egress.PagePort),
		"loopback address and port to serve it at")
	c.RunE = configured(nil, func(c *cobra.Command, _ []string) error {
		if !monitor.IsLocal(address) {
			return fmt.Errorf("--address %q: want a loopback address and a port, like 127.0.0.1:%d", address, egress.PagePort)
		}
		if _, err := agents.client(nil); err != nil {
			return err
		}
		client, err := etcd.dial(c.Context(), quiet)
		if err != nil {
			return err
		}
		defer client.Close()
		fmt.Fprintf(c.OutOrStdout(), "http://%s/\n", address)
		log := slog.New(slog.NewTextHandler(c.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
		pageFlags{local: address, agents: agents}.serve(c.Context(), client, nil, log)
		return nil
	})
	return c
}

// pageFlags are the options of crdsync for the status page.
type pageFlags struct {
	local, remote string
	files         monitor.TLS
	clients       []string
	agents        agentsFlags
}

func (f *pageFlags) add(s *pflag.FlagSet) {
	s.StringVar(&f.local, "page-local-address", "",
		fmt.Sprintf("loopback address and port of the status page, like 127.0.0.1:%d; "+
			"every process of the node can look (default: none)", egress.PagePort))
	s.StringVar(&f.remote, "page-address", "",
		fmt.Sprintf("address and port of the status page for others, over TLS, like 10.0.0.1:%d; "+
			"they show a token of Kubernetes for the audience "+page.Audience+", or a certificate (default: none)", egress.PagePort))
	s.StringVar(&f.files.Cert, "page-cert-file", "",
		"file of the certificate of --page-address; it is read again when it is replaced")
	s.StringVar(&f.files.Key, "page-key-file", "", "file of that certificate's key")
	s.StringVar(&f.files.ClientCA, "page-client-ca-file", "",
		"file of the CA certificates that clients may have a certificate of, in place of a token")
	f.agents.add(s)
	s.StringSliceVar(&f.clients, "page-clients", nil,
		"common names of the client certificates that may see the status page")
}

// Validate returns all that is wrong with the options.
func (f *pageFlags) Validate() error {
	f.files.Options, f.files.Anonymous = "page", true
	var errs []error
	if _, err := f.agents.client(nil); err != nil {
		errs = append(errs, err)
	} else if f.agents.port != 0 && f.local == "" && f.remote == "" {
		errs = append(errs, errors.New("--agents-port: agents are asked for the status page alone: want --page-address or --page-local-address, too"))
	}
	if f.local != "" && !monitor.IsLocal(f.local) {
		errs = append(errs, fmt.Errorf("--page-local-address %q: want a loopback address and a port, like 127.0.0.1:%d; "+
			"others ask at --page-address", f.local, egress.PagePort))
	}
	if len(f.clients) > 0 != (f.files.ClientCA != "") {
		errs = append(errs, errors.New("--page-clients and --page-client-ca-file belong together: only one of them is given"))
	}
	for _, name := range f.clients {
		if strings.TrimSpace(name) == "" {
			errs = append(errs, errors.New("--page-clients: want common names of client certificates, none of them empty"))
		}
	}
	if f.remote == "" {
		if f.files.Cert != "" || f.files.Key != "" || f.files.ClientCA != "" {
			errs = append(errs, errors.New("--page-cert-file, --page-key-file, --page-client-ca-file: "+
				"there are others at --page-address alone: want that too"))
		}
		return errors.Join(errs...)
	}
	at, err := netip.ParseAddrPort(f.remote)
	local, _ := netip.ParseAddrPort(f.local) // the zero AddrPort is no port of --page-address
	switch {
	case err != nil || at.Addr().IsLoopback() || at.Port() == 0:
		errs = append(errs, fmt.Errorf("--page-address %q: want an address of this node and a port, like 10.0.0.1:%d",
			f.remote, egress.PagePort))
	case at.Addr().IsUnspecified() && at.Port() == local.Port():
		errs = append(errs, fmt.Errorf("--page-address %q: all addresses are that of --page-local-address %s too: "+
			"want one address of this node, or another port", f.remote, f.local))
	}
	return errors.Join(append(errs, f.files.Validate())...)
}

// serve serves the page where the options say so, until ctx ends. kube says who may look over the network.
func (f pageFlags) serve(ctx context.Context, client *store.Client, kube *rest.Config, log *slog.Logger) {
	if f.local == "" && f.remote == "" {
		return
	}
	agents, err := f.agents.forPage(log)
	if err != nil { // the files were there when the options were looked at
		log.Error("status page asks no agents", "err", err)
	}
	p := page.New(client, agents, log)
	var running sync.WaitGroup
	defer running.Wait()
	running.Go(func() { _ = p.Run(ctx) }) // it ends without an error
	if f.local != "" {
		running.Go(func() { monitor.ServeLocal(ctx, f.local, maxPage, page.Local(p.Handler()), log) })
	}
	if f.remote != "" {
		access := &page.Access{Names: f.clients, Log: log}
		own := rest.CopyConfig(kube)
		own.QPS, own.Burst = 50, 100 // tokens that are none must not keep others waiting
		if api, err := kubernetes.NewForConfig(own); err == nil {
			access.Review = crdsync.MayGet(api, page.Audience, page.URL)
		} else {
			log.Error("no token of Kubernetes is taken at --page-address", "err", err)
		}
		running.Go(func() { monitor.ServeTLS(ctx, f.remote, f.files, maxPage, access.Restrict(p.Handler()), log) })
	}
}

// beside runs serve for as long as run runs, and returns what that returns.
func beside(ctx context.Context, serve func(context.Context), run func() error) error {
	ctx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); serve(ctx) }()
	defer func() { stop(); <-done }()
	return run()
}

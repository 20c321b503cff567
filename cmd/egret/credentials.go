package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/egret-project/egret/crdsync/credentials"
)

func credentialsCommand() *cobra.Command {
	var config, kubeconfig, master string
	var logs logFlags
	var once bool
	cfg := credentials.Config{}
	c := &cobra.Command{
		Use:   "credentials",
		Short: "Make the key of the gossip, and make and replace the certificates of Egret's own etcd and of metrics",
		Long: "Keeps Secrets of one namespace: the key of the agents' gossip; with --etcd the CA of the etcd that Egret runs, and certificates of its\n" +
			"members and clients; with --metrics another CA, and certificates by which agents and crdsync are asked for metrics.\n" +
			"Certificates live for 90 days and are replaced when 30 are left; the key is made once.",
		Args: cobra.NoArgs,
	}
	s := c.Flags()
	s.StringVar(&config, "config", "", "YAML file of these options, without the dashes; the command line wins")
	s.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig file (default: the pod's service account)")
	s.StringVar(&master, "master", "", "URL of the Kubernetes API, in place of the kubeconfig's")
	s.StringVar(&cfg.Namespace, "namespace", "egret-system", "namespace of the Secrets")
	s.StringVar(&cfg.Service, "etcd-service", "egret-etcd", "Service of etcd's members, whose name their certificates have")
	s.StringVar(&cfg.Peers, "etcd-peer-service", "egret-etcd-peers", "headless Service that names each member to the others")
	s.BoolVar(&cfg.Etcd, "etcd", true, "keep the certificates of Egret's own etcd")
	s.BoolVar(&cfg.Metrics, "metrics", false, "keep the certificates by which agents and crdsync are asked for metrics, and what passes by egress IPs")
	s.BoolVar(&once, "once", false, "make what is missing or due, and end")
	logs.add(s)
	c.RunE = configured(&config, func(c *cobra.Command, _ []string) error {
		var err error
		if cfg.Log, _, err = logs.logger(os.Stderr); err != nil {
			return err
		}
		kube, err := clientcmd.BuildConfigFromFlags(master, kubeconfig)
		if err != nil {
			return fmt.Errorf("reading the Kubernetes configuration (--kubeconfig %q): %w", kubeconfig, err)
		}
		kube.Timeout = 10 * time.Second
		if cfg.Kube, err = kubernetes.NewForConfig(kube); err != nil {
			return err
		}
		if once {
			return credentials.Once(c.Context(), cfg, time.Now())
		}
		cfg.Log.Info("egret credentials", "version", version, "namespace", cfg.Namespace, "api", kube.Host)
		return credentials.Run(c.Context(), cfg)
	})
	return c
}

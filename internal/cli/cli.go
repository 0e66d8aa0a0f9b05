// SPDX-License-Identifier: Apache-2.0

// Package cli adds the command tailscale-impersonate to Caddy, for users who set up the
// plugin.
package cli

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/kubeconfig"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/rbac"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "tailscale-impersonate",
		Usage: "<command>",
		Short: "Sets up access to Kubernetes over a tailnet",
		Long: `
Sets up access to a Kubernetes API server through the tailscale_impersonate handler,
and explains the handler's decisions.`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.AddCommand(kubeconfigCommand(), explainCommand(), rbacCommand())
		},
	})
}

func kubeconfigCommand() *cobra.Command {
	var server, context, caFile, fingerprint string
	var merge bool
	cmd := &cobra.Command{
		Use:   "kubeconfig --server <url> [--context <name>] [--merge] [--ca <file> | --ca-fingerprint <sha256>]",
		Short: "Writes a kubeconfig for the API server behind a Caddy",
		Long: `
Writes a kubeconfig to standard output. It holds no secret, as the tailnet identifies
callers. If the site has a page /whoami, the kubeconfig has a context for each group that
requests may ask for, besides the site's own.

With --merge, the command adds it to the files that kubectl reads by default instead,
those in KUBECONFIG or ~/.kube/config. It does not change existing entries, nor the
current context if there is one.

The command looks at the certificate of the site. If this machine does not trust its
authority, as with "tls internal", the kubeconfig has to name the authority. The command
then prints the authority's SHA-256 fingerprint and writes nothing. Compare it with that of
the authority's certificate, and run the command again with --ca-fingerprint. On the machine
that Caddy runs on, this prints it for Caddy's own authority, with the path in Caddy's storage:

  openssl x509 -noout -sha256 -fingerprint -in pki/authorities/local/root.crt

The command learns the authority from the site's certificate chain, or from its page /whoami.
If neither has it, give the file of the authority's certificate with --ca.`,
		Example: "  caddy tailscale-impersonate kubeconfig --server https://k8s.example.ts.net --merge",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := kubeconfig.New(server, context, nil)
			if err != nil {
				return err
			}
			url := config.Clusters[config.CurrentContext].Server
			var ca *x509.Certificate
			seen, err := look(cmd.Context(), url)
			switch {
			case caFile != "":
				ca, err = readCA(caFile)
			case err == nil:
				ca, err = seen.ca(url, fingerprint)
			case errors.Is(err, errUnreachable) && fingerprint == "":
				fmt.Fprintf(cmd.ErrOrStderr(), "Warning: %v. The kubeconfig works if this machine trusts its certificate. It lacks contexts for groups on request.\n", err)
				err = nil
			}
			if err != nil {
				return err
			}
			if config, err = kubeconfig.New(server, context, ca); err != nil {
				return err
			}
			if seen.isFrom(ca) {
				kubeconfig.AddContexts(config, seen.facts.Choices())
			}
			if !merge {
				text, err := kubeconfig.Write(config)
				if err != nil {
					return err
				}
				_, err = cmd.OutOrStdout().Write(text)
				return err
			}
			name := config.CurrentContext
			current, err := kubeconfig.Merge(config)
			if err != nil {
				return err
			}
			if current != name {
				fmt.Fprintf(cmd.OutOrStdout(), "Added context %q. The current context is still %q. To change that:\n\n  kubectl config use-context %s\n", name, current, name)
				return nil
			}
			fmt.Fprintf(cmd.OutOrStdout(), "The current context is %s.\n", name)
			return nil
		},
	}
	cmd.Flags().StringVar(&server, "server", "", "the URL of the Caddy, such as https://k8s.example.ts.net")
	cmd.Flags().StringVar(&context, "context", "", "the name of the context (default: the host and path in the URL)")
	cmd.Flags().StringVar(&caFile, "ca", "", "the file of the certificate of the authority that the site's certificate is from")
	cmd.Flags().StringVar(&fingerprint, "ca-fingerprint", "", "the SHA-256 fingerprint of that authority's certificate")
	cmd.MarkFlagsMutuallyExclusive("ca", "ca-fingerprint")
	cmd.Flags().BoolVar(&merge, "merge", false, "add the kubeconfig to the files that kubectl reads by default")
	mustRequire(cmd, "server")
	return cmd
}

func explainCommand() *cobra.Command {
	var peer, address string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "explain --peer <node or address> [--address <admin>] [--json]",
		Short: "Shows who a tailnet peer is to the cluster, and why",
		Long: `
Asks the admin API of a running Caddy who a tailnet peer is to the cluster, and prints
which grants give it each of its groups. Name the peer by its tailnet name, its address
or its node ID. It need not have sent a request.`,
		Example: "  caddy tailscale-impersonate explain --peer laptop",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := caddycmd.AdminAPIRequest(address, http.MethodGet, "/tailscale_impersonate/peers/"+url.PathEscape(peer), nil, nil)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			var answer struct {
				Peers []*whoami.Facts `json:"peers"`
			}
			if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
				return fmt.Errorf("reading the admin API's answer: %w", err)
			}
			if asJSON {
				encoder := json.NewEncoder(cmd.OutOrStdout())
				encoder.SetIndent("", "  ")
				return encoder.Encode(answer)
			}
			return whoami.WriteText(cmd.OutOrStdout(), answer.Peers...)
		},
	}
	cmd.Flags().StringVar(&peer, "peer", "", "the peer's tailnet name, address or node ID")
	cmd.Flags().StringVar(&address, "address", caddy.DefaultAdminListen, "the address of Caddy's admin API")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	mustRequire(cmd, "peer")
	return cmd
}

func rbacCommand() *cobra.Command {
	var policy string
	options := rbac.Defaults()
	cmd := &cobra.Command{
		Use:   "rbac --policy <file> [--constrained] [--audit]",
		Short: "Writes the minimal RBAC for the proxy from a tailnet policy file",
		Long: `
Writes a ClusterRole and its binding. They allow the proxy's service account to
impersonate the groups that a tailnet policy file names in grants and as tags, and no
others. Run it again when the policy file changes. Grants with unknown or repeated keys
are reported on standard error.`,
		Example: "  caddy tailscale-impersonate rbac --policy policy.hujson | kubectl apply -f -",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := os.ReadFile(policy)
			if err != nil {
				return err
			}
			manifest, err := rbac.FromPolicy(text, options)
			if err != nil {
				return fmt.Errorf("%s: %w", policy, err)
			}
			problems, err := rbac.Problems(text, options)
			if err != nil {
				return fmt.Errorf("%s: %w", policy, err)
			}
			for _, problem := range problems {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s: %s\n", policy, problem)
			}
			_, err = cmd.OutOrStdout().Write(manifest)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&policy, "policy", "", "the tailnet policy file")
	f.BoolVar(&options.Constrained, "constrained", false, "for API servers with constrained impersonation (Kubernetes 1.36 and later)")
	f.BoolVar(&options.Audit, "audit", false, "for a handler with the option audit")
	f.StringVar(&options.Capability, "capability", "", "the value of the handler's option capability, if set")
	f.StringVar(&options.GroupPrefix, "group-prefix", "", "the value of the handler's option group_prefix, if set")
	f.StringVar(&options.Name, "name", options.Name, "the name of the ClusterRole and of its binding")
	f.StringVar(&options.Namespace, "namespace", options.Namespace, "the namespace of the proxy's service account")
	f.StringVar(&options.ServiceAccount, "service-account", options.ServiceAccount, "the name of the proxy's service account")
	mustRequire(cmd, "policy")
	return cmd
}

// mustRequire marks flag as required.
func mustRequire(cmd *cobra.Command, flag string) {
	if err := cmd.MarkFlagRequired(flag); err != nil {
		panic(errors.Join(errors.New("[unexpected]"), err))
	}
}

// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/kubeconfig"
)

// kubeconfigFlags are the flags of the command kubeconfig.
type kubeconfigFlags struct {
	server, context     string
	caFile, fingerprint string
	merge, all, prune   bool
}

func kubeconfigCommand() *cobra.Command {
	var flags kubeconfigFlags
	cmd := &cobra.Command{
		Use:   "kubeconfig --server <url> [--context <name>] [--merge] [--all [--prune]] [--ca <file> | --ca-fingerprint <sha256>]",
		Short: "Writes a kubeconfig for the API server behind a Caddy",
		Long: `
Writes a kubeconfig to standard output. It holds no secret, as the tailnet identifies
callers. If the site has a page /whoami, the kubeconfig has a context for each group that
requests may ask for, besides the site's own.

With --merge, the command adds it to the files that kubectl reads by default instead,
those in KUBECONFIG or ~/.kube/config. It does not change existing entries, nor the
current context if there is one.

With --all, the kubeconfig is for all sites of the same Caddy that you may use, as the page
/whoami of any of them lists them. The command merges it, unless --merge=false prints it. It
marks what it adds. Run it again to update that; with --prune, it also removes what it added
for sites and groups that you may no longer use. It never changes or removes other entries.

The command looks at the certificate of the site. If this machine does not trust its
authority, as with "tls internal", the kubeconfig has to name the authority. The command
then prints the authority's SHA-256 fingerprint and writes nothing. Compare it with that of
the authority's certificate, and run the command again with --ca-fingerprint. On the machine
that Caddy runs on, this prints it for Caddy's own authority, with the path in Caddy's storage:

  openssl x509 -noout -sha256 -fingerprint -in pki/authorities/local/root.crt

The command learns the authority from the site's certificate chain, or from its page /whoami.
If neither has it, give the file of the authority's certificate with --ca. With --all, the
site names the authorities of the others.`,
		Example: `  caddy tailscale-impersonate kubeconfig --server https://k8s.example.ts.net --merge
  caddy tailscale-impersonate kubeconfig --server https://k8s.example.ts.net --all --prune`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case flags.all && flags.context != "":
				return errors.New("--all has a context for each site, and --context names only one: leave one of them out")
			case flags.prune && !flags.all:
				return errors.New("--prune needs --all, to tell which sites there are")
			}
			if flags.all && !cmd.Flags().Changed("merge") {
				flags.merge = true
			}
			if flags.prune && !flags.merge {
				return errors.New("--prune removes contexts from the files that kubectl reads, and --merge=false leaves those alone: leave one of them out")
			}
			return flags.run(cmd)
		},
	}
	cmd.Flags().StringVar(&flags.server, "server", "", "the URL of the Caddy, such as https://k8s.example.ts.net")
	cmd.Flags().StringVar(&flags.context, "context", "", "the name of the context (default: the host and path in the URL)")
	cmd.Flags().StringVar(&flags.caFile, "ca", "", "the file of the certificate of the authority that the site's certificate is from")
	cmd.Flags().StringVar(&flags.fingerprint, "ca-fingerprint", "", "the SHA-256 fingerprint of that authority's certificate")
	cmd.MarkFlagsMutuallyExclusive("ca", "ca-fingerprint")
	cmd.Flags().BoolVar(&flags.merge, "merge", false, "add the kubeconfig to the files that kubectl reads by default")
	cmd.Flags().BoolVar(&flags.all, "all", false, "merge the contexts of all sites of the Caddy that you may use")
	cmd.Flags().BoolVar(&flags.prune, "prune", false, "with --all, remove contexts that --all added and that are gone")
	mustRequire(cmd, "server")
	return cmd
}

// run runs the command.
func (flags *kubeconfigFlags) run(cmd *cobra.Command) error {
	config, err := kubeconfig.New(flags.server, flags.context, nil)
	if err != nil {
		return err
	}
	url := config.Clusters[config.CurrentContext].Server
	var ca *x509.Certificate
	seen, unseen := look(cmd.Context(), url)
	err = unseen
	switch {
	case flags.caFile != "":
		ca, err = readCA(flags.caFile)
	case err == nil:
		ca, err = seen.ca(url, flags.fingerprint)
	case errors.Is(err, errUnreachable) && flags.fingerprint == "" && !flags.all:
		fmt.Fprintf(cmd.ErrOrStderr(), "Warning: %v. The kubeconfig works if this machine trusts its certificate. It lacks contexts for groups on request.\n", err)
		err = nil
	}
	if err != nil {
		return err
	}
	switch {
	case flags.all && unseen != nil:
		return unseen
	case flags.all:
		config, err = seen.list(url, ca)
	default:
		config, err = kubeconfig.New(flags.server, flags.context, ca)
		if err == nil && seen.isFrom(ca) {
			kubeconfig.AddContexts(config, seen.facts.Choices())
		}
	}
	if err != nil {
		return err
	}
	switch {
	case !flags.merge:
		text, err := kubeconfig.Write(config)
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(text)
		return err
	case flags.all:
		if flags.prune && seen.facts.SitesIncomplete {
			return fmt.Errorf("not every site of the Caddy has answered %s/whoami, so it is not known which are gone, and nothing is changed: run the command again later, or without --prune", url)
		}
		changes, err := kubeconfig.Sync(kubeconfig.Listing{From: url, Config: config}, flags.prune)
		if err != nil {
			return err
		}
		report(cmd.OutOrStdout(), changes, config.CurrentContext)
		return nil
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
}

// list returns a kubeconfig for all sites that the page of the site at the URL server lists.
// The certificate of the site is from ca, as for isFrom.
//
// It makes the entries itself, from a few fields: a kubeconfig that somebody else wrote can
// run programs.
func (s *site) list(server string, ca *x509.Certificate) (*api.Config, error) {
	switch {
	case !s.isFrom(ca):
		return nil, fmt.Errorf("the certificate of %s is not from the authority that --ca names, so its list of sites is not used", server)
	case s.facts.Server == "":
		return nil, fmt.Errorf("%s/whoami lists no sites: the site needs the option whoami, without a path of its own", server)
	case s.facts.Refused != "" && len(s.facts.Sites) == 0:
		return nil, fmt.Errorf("you may use no site of this Caddy: %q", s.facts.Refused)
	}
	if err := s.facts.ReadCertificates(); err != nil {
		return nil, err
	}
	s.facts.Server, s.facts.CA = server, ca // as this machine sees them
	return kubeconfig.ForSites(s.facts.All()...)
}

// report says what has changed. The default context of the site is wanted.
func report(out io.Writer, changes *kubeconfig.Changes, wanted string) {
	for _, list := range []struct {
		title string
		names []string
	}{{"Added", changes.Added}, {"Removed", changes.Removed}} {
		if len(list.names) == 0 {
			continue
		}
		fmt.Fprintf(out, "%s contexts:\n\n", list.title)
		for _, name := range list.names {
			fmt.Fprintf(out, "  %s\n", name)
		}
		fmt.Fprintln(out)
	}
	if len(changes.Added)+len(changes.Removed) == 0 {
		fmt.Fprintln(out, "All contexts were there already.")
	}
	if changes.Current == wanted {
		fmt.Fprintf(out, "The current context is %s.\n", wanted)
		return
	}
	fmt.Fprintf(out, "The current context is still %q. To change that:\n\n  kubectl config use-context %s\n", changes.Current, wanted)
}

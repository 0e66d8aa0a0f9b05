// SPDX-License-Identifier: Apache-2.0

package main

// kubeconfigs are the lines that decide which authority a kubeconfig makes kubectl trust.
var kubeconfigs = []file{
	{"internal/cli/ca.go", "./internal/cli", []mutant{
		{name: "an authority needs a fingerprint", old: "\tcase fingerprint == \"\":\n", new: "\tcase false:\n"},
		{name: "a fingerprint is compared", old: "\tcase !sameFingerprint(fingerprint, got):", new: "\tcase false:"},
		{name: "all of a fingerprint is compared", old: "return strings.EqualFold(plain(a), plain(b))", new: "return strings.HasSuffix(plain(b), strings.ToUpper(plain(a)))"},
		{name: "the site's certificate leads to the authority", old: "ca := siteca.Root(s.chain, append(siteca.SelfSigned(s.chain), s.named...))", new: "ca := append(append(siteca.SelfSigned(s.chain), s.named...), nil)[0]"},
	}},
	{"internal/siteca/site.go", "./internal/siteca", []mutant{
		{name: "Caddy's own authority is named where its host trusts it", old: "if own := Root(chain, s.own()); own != nil {", new: "if own := Root(chain, s.own()); own != nil && !Public(chain) {"},
		{name: "a public authority is left out", old: "\tif Public(chain) {\n\t\treturn nil, nil\n\t}\n", new: ""},
		{name: "only a root is named", old: "return Root(chain, SelfSigned(chain)), nil", new: "return Root(chain, chain), nil"},
	}},
	{"internal/siteca/siteca.go", "./internal/siteca", []mutant{
		{name: "a chain leads to the authority", old: "\treturn err == nil\n", new: "\treturn err == nil || roots != nil\n"},
	}},
	{"internal/kubeconfig/kubeconfig.go", "./internal/kubeconfig", []mutant{
		{name: "an entry with another authority is another entry", old: "bytes.Equal(a.CertificateAuthorityData, b.CertificateAuthorityData))", new: "len(a.CertificateAuthorityData) > 0 && bytes.Equal(nil, nil))"},
	}},
	{"internal/authn/visit.go", "./internal/authn", []mutant{
		{name: "another device with the address is not the visitor", old: "if res.err != nil || res.device != visitor.device {", new: "if res.err != nil {"},
		{name: "who is refused by a site is not told of it", old: "if res.err != nil || res.device != visitor.device {", new: "if res.device != visitor.device {"},
		{name: "devices without keys are not told apart", old: "\tif visitor.device.IsZero() {", new: "\tif false {"},
		{name: "an address of two nodes leads to neither", old: "\tcase err != nil || owner != node:", new: "\tcase err == nil && owner != node:"},
		{name: "a visitor is who it was when it connected", old: "visitor.Address, at}, visitor.since)", new: "visitor.Address, at}, time.Time{})"},
		{name: "a site over plain HTTP has the node's names", old: "\tif !door.TLS && !slices.Contains(", new: "\tif false && !slices.Contains("},
		{name: "at a service, a visitor has what it is granted there", old: "\taddrs, ok := node.Hosts(door.Service, door.Port)\n", new: "\tip4, _ := node.Addrs()\n\taddrs, ok := []netip.Addr{ip4}, true\n"},
	}},
	{"internal/sites/find.go", ".", []mutant{
		{name: "a site behind other matchers is left out", old: "\t\tdefault:\n\t\t\treturn at, false\n", new: ""},
		{name: "a path leads to the page", old: "\t\tif !at.leadsTo(w.whoami) {", new: "\t\tif false {"},
	}},
	{"internal/kubeconfig/sync.go", "./internal/kubeconfig", []mutant{
		{name: "what --all did not write stays", old: "&& written && s.wrote(name, context.Extensions) {", new: "&& written {"},
		{name: "what its user renamed stays", old: "&& m.Name == name && s.known[m.From]", new: "&& s.known[m.From]"},
		{name: "what another Caddy listed stays", old: "&& m.Name == name && s.known[m.From]", new: "&& m.Name == name"},
		{name: "what its user points elsewhere stays", old: "\t\twritten := context.AuthInfo == name && ", new: "\t\twritten := "},
		{name: "a cluster that a context names stays", old: "wanted.Clusters[name] == nil && !named[\"cluster \"+name] &&", new: "wanted.Clusters[name] == nil &&"},
		{name: "what --all did not write is not updated", old: "\t\tcase !s.wrote(name, *k.extensions(existing)):", new: "\t\tcase false:"},
	}},
	{"internal/cli/kubeconfig.go", "./internal/cli", []mutant{
		{name: "only a site that is trusted lists others", old: "\tcase !s.isFrom(ca):", new: "\tcase false:"},
		{name: "an incomplete list removes nothing", old: "\t\tif flags.prune && seen.facts.SitesIncomplete {", new: "\t\tif false {"},
	}},
}

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
}

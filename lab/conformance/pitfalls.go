// SPDX-License-Identifier: Apache-2.0

package conformance

// pitfall is one way in which such proxies have gone wrong.
type pitfall struct {
	// id is what it is called, for good.
	id, title string
	// tests are those that show it where no request of a client can, or that look
	// closer: "package folder:name". One that needs what Headscale does not have
	// says with what it makes do.
	tests []string
}

// pitfalls are all of them. Those without tests are what attacks are for.
var pitfalls = []pitfall{
	{id: honestID, title: "honest requests"},
	{id: "1", title: "Connection names identity headers"},
	{id: "2", title: "the config changes the headers again", tests: []string{".:TestHeaderOperationsDoNotChangeIdentity"}},
	{id: "3", title: "an error about identity is ignored", tests: []string{".:TestNoIdentityNoRequest", ".:TestSilentNodeIsAnError", "impersonate:TestAnswerThatNamesNobodyIsAnError", "impersonate:TestGrantThatCannotBeReadIsNoIdentity"}},
	{id: "4", title: "Impersonate-* that is not invented yet"},
	{id: "5", title: "the client's groups beside the caller's"},
	{id: "6", title: "extra keys"},
	{id: "7", title: "values that are cut, folded or split", tests: []string{"impersonate:TestUserThatAHeaderCannotCarryIsNoIdentity", "impersonate:TestGroupThatAHeaderCannotCarryIsNoIdentity"}},
	{id: "8", title: "underscores and dots for hyphens"},
	{id: "9", title: "X-Remote-*"},
	{id: "10", title: "credentials of the client's own"},
	{id: "11", title: "addresses that the client makes up"},
	{id: "12", title: "placeholders are expanded", tests: []string{".:TestGroupsAreNotExpanded"}},
	{id: "13", title: "framing, trailers, targets and hosts"},
	{id: "14", title: "a socket of the host"},
	{id: "15", title: "two nodes, or two tailnets", tests: []string{"lab/e2e:TestOnAServerWithTwoNodesTheOneThatAcceptedIsAsked", "lab/e2e:TestTwoNodesWithTheSameAddressAreRefusedByName"}},
	{id: "16", title: "the PROXY protocol"},
	{id: "17", title: "IPv6, mapped addresses, Tailscale Services", tests: []string{
		"tailnet:TestMappedAddressesAreUnmapped",
		".:TestServicesOfTailscaleAreRefused", // Headscale has none: an injected node
	}},
	{id: "18", title: "nodes shared in from another tailnet", tests: []string{
		"lab/testcontrol:TestASharedNodesTagsAreNoGroups", // Headscale has none: Tailscale's own test control server
		"impersonate:TestMapping",
	}},
	{id: "19", title: "login names that are reserved", tests: []string{"impersonate:TestUserOfTheClusterItselfIsNoIdentity"}},
	{id: "20", title: "Funnel", tests: []string{
		"tailnet:TestFunnelIsRefused",       // Headscale has none: the type of connection that Funnel's listener hands over
		".:TestFunnelHasNoPeerAndIsRefused", // an injected WhoIs
	}},
	{id: "20a", title: "web pages"},
	{id: "20b", title: "the proxy's own node"},
	{id: "20c", title: "CONNECT, HTTP/3"},
	{id: "21", title: "upgrades to anything, requests behind them", tests: []string{"lab/e2e:TestAnUpgradeThatIsRefusedLeavesTheConnectionToHTTP"}},
	{id: "22", title: "silent streams, slow answers", tests: []string{"lab/e2e:TestWhatIsSilentForMoreThanAMinuteGoesOn", "lab/e2e:TestAnAnswerMayTakeMoreThanAMinute"}},
	{id: "23", title: "half-close", tests: []string{"lab/e2e:TestAPipeLosesNoByte"}},
	{id: "24", title: "config reloads", tests: []string{"lab/e2e:TestAConfigReloadEndsNoStream", "lab/e2e:TestAConnectionTakenByTheOldConfigIsStillBobs"}},
	{id: "25", title: "buffers in front of a watch", tests: []string{".:TestBuffersInTheWayOfStreamsAreWarnedAbout"}},
	{id: "26", title: "bodies held in memory", tests: []string{"lab/e2e:TestAPipeLosesNoByte"}},
	{id: "27", title: "access withdrawn from open sessions", tests: []string{"lab/e2e:TestAGrantThatIsWithdrawnEndsOpenStreams", "lab/e2e:TestStreamsOfADeviceThatLeavesAreEnded"}},
	{id: "28", title: "paths spelled differently"},
	{id: "32", title: "tokens rotate", tests: []string{"transport:TestTokenRotation", "lab/e2e:TestATokenThatIsReplacedMidRunFailsNoRequest"}},
	{id: "33", title: "a token that cannot be read", tests: []string{"transport:TestNoTokenNoRequest"}},
	{id: "34", title: "health checks have no caller", tests: []string{"transport:TestHealthChecksCarryNoCredentials", "transport:TestAClientCannotPassForAHealthCheck"}},
	{id: "35", title: "a certificate beside a token", tests: []string{"transport:TestKubeconfigErrors", "transport:TestWithClientCredentialsNothingOfTheProxysIsSent"}},
	{id: "36", title: "a reverse_proxy without the handler", tests: []string{".:TestNestedReverseProxies", ".:TestForgottenHandler"}},
	{id: all, title: "several of these at once"},
}

// IDs of what belongs to no single pitfall: several at once, and none.
const (
	all      = "*"
	honestID = "0"
)

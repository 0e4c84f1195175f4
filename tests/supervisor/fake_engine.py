from tests.supervisor.fake_child import main

main("FAKE_ENGINE")
